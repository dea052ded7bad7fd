"""A package, so that an installed package of the same name (torch-fidelity brings one) does not hide these modules."""
