"""The scripts are played by the test, in processes of their own; they are no test modules."""

collect_ignore_glob = ["played/*", "play.py"]
