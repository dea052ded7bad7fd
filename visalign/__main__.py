"""``python -m visalign``, which is also what ``torchrun -m visalign`` starts."""

from visalign.cli import main

if __name__ == "__main__":
    main()
