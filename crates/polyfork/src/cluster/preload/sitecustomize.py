"""Lets a uvicorn worker leave without cutting anybody off.

Polyfork puts the folder of this file at the head of PYTHONPATH of the Python workers it starts, and Python imports a module
of this name before the program. A uvicorn that is asked to leave then answers one more request on each kept-alive
connection, with `connection: close`; stock uvicorn closes the idle ones at once, under a request that may be on its way
(RFC 9112, 9.5 and 9.6). Signals, grace periods and which worker is to leave are the business of others: uvicorn's own limits
and a forced exit win as ever. WebSockets and HTTP/2 are left to uvicorn.

The surprising rule: until uvicorn shuts down, this does next to nothing. It takes itself out of the environment, so that
children of the worker run without it, and out of the search path; it lets the module of this name that it hides be
imported; it imports nothing of uvicorn, and waits for `uvicorn.server` to be imported to put one function around one
method. Whatever is not as it is known here, and whatever fails in here, leaves uvicorn as it is, in silence.

Behaviour follows: CPython `Lib/site.py` (`execsitecustomize`), `Lib/importlib/_bootstrap.py`; uvicorn `server.py`,
`protocols/http/*_impl.py`. Written so that every Python 3 can read it, and Python 2 too.
"""

import os
import sys

# ---- The environment -----------------------------------------------------------------------------------------


def take_seconds(name, otherwise):
    """A variable in milliseconds, which the program does not get to see."""
    text = os.environ.pop(name, "")
    return int(text) / 1e3 if text.isdigit() and len(text) <= 10 else otherwise


def restore_environment():
    """Leaves PYTHONPATH as the user set it, empty or absent."""
    # What was put before it, to the letter: ours alone when there was none.
    added = os.environ.pop("POLYFORK_PRELOAD", "")
    path = os.environ.get("PYTHONPATH")
    if not added or path is None:
        return
    if path == added:
        del os.environ["PYTHONPATH"]
    elif path + os.pathsep == added:
        os.environ["PYTHONPATH"] = ""
    elif path.startswith(added):
        os.environ["PYTHONPATH"] = path[len(added) :]


def leave_search_path():
    """Takes our folder, which comes first, out of the places where Python looks for modules."""
    folder = os.path.dirname(__file__)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path_importer_cache.pop(folder, None)


# ---- What is watched before a drain --------------------------------------------------------------------------

#: The module that is waited for.
SERVER = "uvicorn.server"


class Finder(object):
    """Finds nothing; waits for the one module to be imported by way of the others."""

    def __init__(self):
        self.waits = True

    def find_spec(self, name, path=None, target=None):
        if name != SERVER or not self.waits:
            return None
        self.waits = False  # or we would ask ourselves
        try:
            from importlib.util import find_spec

            spec = find_spec(name)
            self.call_after_loading(spec.loader, watch_server)
            return spec
        except Exception:
            return None  # the next finder will say what is wrong
        finally:
            self.waits = True  # it may only have been looked for

    def call_after_loading(self, loader, action):
        """Has `action` called with the module once `loader` has loaded it."""
        load = loader.exec_module

        def exec_module(module):
            load(module)
            if module.__name__ == SERVER:
                self.waits = False
                guarded(action, module)

        loader.exec_module = exec_module


def watch_server(module):
    """Has every server of uvicorn begin its shutdown with a drain."""
    original = module.Server.__dict__["shutdown"]
    if not original.__code__.co_flags & 0x80:  # an `async def`, see CO_COROUTINE
        return
    from functools import wraps

    @wraps(original)
    def shutdown(self, *args, **kwargs):
        guarded(begin, self)
        return original(self, *args, **kwargs)

    module.Server.shutdown = shutdown


def guarded(action, *args):
    """The program never sees an error of ours."""
    try:
        return action(*args)
    except Exception:
        return None


# ---- The drain -----------------------------------------------------------------------------------------------

#: How long a connection must have been idle, since the drain began, to be closed.
QUIET = take_seconds("POLYFORK_LINGER_MS", 1.0)
#: For how many quiet times a client may be about a request that it does not finish to send.
PATIENCE = 5
#: For what has arrived to be read, before a connection is closed.
LAST_LOOK = 0.01

CLOSE = (b"connection", b"close")

#: Protocols that are known: their modules, and their names in there.
PROTOCOLS = {
    "uvicorn.protocols.http.h11_impl": "H11Protocol",
    "uvicorn.protocols.http.httptools_impl": "HttpToolsProtocol",
    "uvicorn.protocols.http.zttp_impl": "ZttpProtocol",
}
#: What is used of them.
METHODS = ("shutdown", "_unset_keepalive_if_required", "timeout_keep_alive_handler", "on_response_complete")


def begin(server):
    """Called just before uvicorn closes its listeners and asks every connection to end."""
    from asyncio import get_running_loop

    loop, state, quiet = get_running_loop(), server.server_state, QUIET
    limit = server.config.timeout_graceful_shutdown
    if limit is not None:
        quiet = min(quiet, limit / 2.0)
    drain = Drain(loop, state, quiet)
    for connection in list(state.connections):
        guarded(drain.spare, connection)
    loop.call_later(quiet * PATIENCE, drain.sweep)


class Drain(object):
    """One server that shuts down."""

    def __init__(self, loop, state, quiet):
        self.loop = loop
        self.state = state
        self.quiet = quiet
        #: What uvicorn tells by itself that it is over.
        self.told = set(state.connections)
        self.protocols = ()
        for protocol, cycle in known():
            self.watch(cycle)
            self.protocols += (protocol,)

    def watch(self, cycle):
        """Has the answers of this server that are yet to come say `close`."""
        original = cycle.__init__

        def __init__(answer, *args, **kwargs):
            original(answer, *args, **kwargs)
            connection = getattr(answer.on_response, "__self__", None)
            if getattr(connection, "server_state", None) is self.state:
                answer.default_headers = Headers(answer.default_headers, connection, answer)

        cycle.__init__ = __init__

    def spare(self, connection):
        """Keeps one connection from being closed by the shutdown that follows."""
        if not isinstance(connection, self.protocols) or connection.transport.is_closing():
            return
        answer, close = connection.cycle, connection.timeout_keep_alive_handler

        def look_again():
            # A request that arrived, and was not read because the loop was busy, takes this timer away.
            connection.timeout_keep_alive_task = self.loop.call_later(LAST_LOOK, close)

        def shutdown():
            del connection.shutdown  # later ones are uvicorn's again

        if is_idle(connection):
            connection._unset_keepalive_if_required()
            connection.timeout_keep_alive_task = self.loop.call_later(self.quiet, look_again)
        elif not answer.response_started:
            answer.default_headers = Headers(answer.default_headers, connection, answer)
        # An answer that began without `close` is followed by one more request, or by nothing for the quiet time.
        connection.timeout_keep_alive = min(connection.timeout_keep_alive, self.quiet)
        connection.timeout_keep_alive_handler = look_again
        connection.shutdown = shutdown

    def sweep(self):
        """Ends what no timer would: a request that does not arrive in full, a connection or WebSocket that came late."""
        for connection in list(self.state.connections):
            if isinstance(connection, self.protocols):
                guarded(self.end, connection)
            elif connection not in self.told:
                self.told.add(connection)
                guarded(connection.shutdown)
        if self.state.connections:
            self.loop.call_later(self.quiet, self.sweep)

    def end(self, connection):
        if connection.timeout_keep_alive_task is None and is_idle(connection):
            type(connection).shutdown(connection)


def known():
    """The protocols that were imported, each with the class of its answers, as far as they are what we know."""
    for name, protocol in PROTOCOLS.items():
        module = sys.modules.get(name)
        protocol, cycle = getattr(module, protocol, None), getattr(module, "RequestResponseCycle", None)
        if protocol is None or cycle is None:
            continue
        taken = getattr(getattr(cycle.__init__, "__code__", None), "co_varnames", ())
        if "default_headers" not in taken or "on_response" not in taken:
            continue
        if all(callable(getattr(protocol, method, None)) for method in METHODS):
            yield protocol, cycle


def is_idle(connection):
    """Whether the head of no request waits for its answer; there may be the beginning of one."""
    return connection.cycle is None or connection.cycle.response_complete


class Headers(list):
    """What uvicorn adds the headers of an answer to, when it writes the head: by then it is known whether it is the last."""

    def __init__(self, headers, connection, answer):
        list.__init__(self, headers)
        self.connection = connection
        self.answer = answer

    def __add__(self, others):
        headers = list(self) + others
        try:
            return with_close(headers) if is_last(self.connection, self.answer) else headers
        except Exception:
            return headers


def is_last(connection, answer):
    """Whether no later request was read: what follows a `close` would be lost."""
    if connection.cycle is not answer:
        return False
    h11 = sys.modules.get("h11")
    if h11 is None or not isinstance(getattr(connection, "conn", None), h11.Connection):
        return True
    return not (connection.conn.their_state is h11.DONE and connection.conn.trailing_data[0])


def with_close(headers):
    """The same headers with `connection: close`. Proxies copy `keep-alive` from the answer they pass on."""
    values = [value.lower().strip() for name, value in headers if name.lower() == b"connection"]
    if any(b"close" in value for value in values):
        return headers
    kept = [(n, v) for n, v in headers if n.lower() != b"connection" or v.lower().strip() != b"keep-alive"]
    return kept + [CLOSE]


# ---- The beginning -------------------------------------------------------------------------------------------

guarded(restore_environment)
guarded(leave_search_path)
if sys.version_info >= (3, 7):
    sys.meta_path.insert(0, Finder())

# Python goes on as if this file were not there: it takes from `sys.modules` what is imported here, and an error, that
# there is no such module too, is met as always. `hidden` holds what runs right now, which Python 2 would clear.
hidden = sys.modules.pop(__name__)
import sitecustomize  # noqa: E402,F401
