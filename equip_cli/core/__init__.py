"""What the Python API needs: the native library, models, sessions, policies, and the ranges and errors of all of them."""
