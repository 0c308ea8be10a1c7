"""What the commands share: their options, and the steps from what was typed to a model and a session."""
