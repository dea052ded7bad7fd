"""From K standardised rewards to one: shapes of single rewards, and combiners of all of them.

    raw -> direction -> frozen standardisation -> shape -> combine -> group advantage

``credit.assign_credit`` calls them; ``named.py`` builds them from a configuration. The formulas are in ``maths/composition*.py``.
"""
