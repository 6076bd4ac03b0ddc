"""Train or load networks, export them, fuse them, and write the files with a manifest."""
