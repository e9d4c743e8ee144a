"""Scripts that run in `.venv-peers-compress`, made by `tools/setup-peers compress`."""
