"""Jobs from folder to folder: export, verify, download, cache, bake, deploy."""
