"""Serve a pipeline over HTTP (extra `serve`), and talk to it in a browser (extra `app`)."""
