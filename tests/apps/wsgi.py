"""A WSGI application for gunicorn; the paths are those of README.md."""

import json
import os
import time
from urllib.parse import parse_qs

requests = 0


def app(environ, start_response):
    global requests
    query = {key: values[0] for key, values in parse_qs(environ.get("QUERY_STRING", "")).items()}
    path = environ["PATH_INFO"]
    requests += 1
    body = {"pid": os.getpid(), "worker": None, "n": requests}
    if path in ("/slow", "/spin"):  # one request at a time: waiting and working are the same here
        time.sleep(int(query.get("ms", 0)) / 1000)
    elif path == "/crash":
        os._exit(int(query.get("code", 0)))
    elif path == "/env":
        body["value"] = os.environ.get(query.get("name", ""))
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(body).encode()]
