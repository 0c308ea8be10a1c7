"""What a policy does to quality: the measures of `equip eval`, and their tables."""
