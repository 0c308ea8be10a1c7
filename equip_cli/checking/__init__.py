"""Whether a machine computes what it should: the rows of `equip check`, and what they are judged by."""
