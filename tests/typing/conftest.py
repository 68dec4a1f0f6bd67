"""The scripts here are for mypy to read; as modules they would fail, since reveal_type is no function."""

collect_ignore = ["user_script.py", "torch_script.py"]
