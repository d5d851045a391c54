"""An ASGI application for uvicorn and granian; the paths are those of README.md."""

import asyncio
import json
import os
import time
from urllib.parse import parse_qs

requests = 0


async def app(scope, receive, send):
    global requests
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode()).items()}
    milliseconds = int(query.get("ms", 0))
    requests += 1
    body = {"pid": os.getpid(), "worker": None, "n": requests}
    if scope["path"] == "/slow":
        await asyncio.sleep(milliseconds / 1000)
    elif scope["path"] == "/spin":
        time.sleep(milliseconds / 1000)  # blocks the loop on purpose
    elif scope["path"] == "/crash":
        os._exit(int(query.get("code", 0)))
    elif scope["path"] == "/env":
        body["value"] = os.environ.get(query.get("name", ""))
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def lifespan(receive, send):
    """Start-up and shutdown, as the server asks for them."""
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return
