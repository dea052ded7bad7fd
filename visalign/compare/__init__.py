"""Two aligned sets of samples against each other: what ``visalign eval`` asks, computes and writes.

    unigenbench.py      prompts with test points, from the benchmark's file
    pairing.py          which samples belong together, and which are still to be made
    measurement.py      asks rewards and judges about both sets
    comparison.py       gains and win rates, judges asked in both orders
    breakdown.py        tables by tag or by dimension
    set_contrast.py     numbers of whole sets, with error and bias
    summary.py          from answers to a result
    comparison_file.py  the result and its file
"""
