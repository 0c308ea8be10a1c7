"""llama-server on a bounded cache: where the program is, what it is told, and what it says while it runs."""
