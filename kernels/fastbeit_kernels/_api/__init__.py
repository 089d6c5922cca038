"""The public functions: arguments checked, implementation chosen. One module an operation."""
