"""What a command and its user say to each other: results, notes, progress, tables, and being told to stop."""
