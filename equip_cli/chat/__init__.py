"""Conversations: templates, turns, what is typed and shown, and the file of every chat."""
