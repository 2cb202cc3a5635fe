"""What pages for people have in common: their settings, and a server of the standard library.

A page is one HTML file. Its script asks for actions, functions that are called with JSON and
answer with JSON. Only this machine can reach the server, and only its own page may ask.
"""
import json
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from nanorlhf.support import UserError

STATUS = {PermissionError: 403, FileNotFoundError: 404, UserError: 500}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:; "
           "frame-ancestors 'none'"}  # nothing of other sites, and in no page of theirs
LONGEST = 2**20                       # bytes that a page may send at once


@dataclass
class PageConfig:
    """How answers are sampled, and where the page is."""
    open: bool = True                 # open the page
    port: int = 8642                  # of the page; 0: any that is free
    temperature: float = 1.0          # of sampling
    max_new_tokens: int = 80          # longest answer
    seed: int = 1                     # of everything that is drawn at random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    RANGES = dict(port=(0, 65535))


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; other requests are actions of the server."""
    timeout = 10                      # seconds without a byte, after which a connection is closed

    def do_GET(self):
        try:
            status, (kind, texts) = 200, self.answer()
        except (UserError, OSError, ValueError, TypeError, RecursionError) as error:
            status, kind, texts = STATUS.get(type(error), 400), "text/plain", [str(error)]
        with suppress(ConnectionError, TimeoutError):          # the window was closed meanwhile
            self.send_response(status)
            for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            for text in texts:
                self.wfile.write(text.encode(errors="replace"))

    do_POST = do_GET

    def answer(self):
        """-> type and texts. An action returns a dict, or yields dicts, which are sent as lines."""
        request, port = f"{self.command} {self.path}", self.server.server_port
        host, length = (self.headers.get(name, "") for name in ("Host", "Content-Length"))
        # Not for pages of other sites, nor under a name of theirs that leads to this machine.
        if (host not in (f"127.0.0.1:{port}", f"localhost:{port}")
                or self.headers.get("Origin", f"http://{host}") != f"http://{host}"):
            raise PermissionError("expected a request of this program's own page")
        if request == "GET /":
            return "text/html", [self.server.html.read_text(encoding="utf-8")]
        if request not in self.server.actions:
            raise FileNotFoundError(f"expected / or {', '.join(self.server.actions)}")
        fields = {}
        if self.command == "POST":
            # Without asking first, a page of another site can send a form, but not JSON.
            if self.headers.get("Content-Type") != "application/json":
                raise ValueError("expected JSON")
            if not length.isdecimal() or int(length) > LONGEST:
                raise ValueError(f"expected JSON of {LONGEST:,} bytes at most")
            fields = json.loads(self.rfile.read(int(length)))
        result = self.server.actions[request](**fields)
        return "application/json", ([json.dumps(result)] if isinstance(result, dict) else
                                    (json.dumps(line, ensure_ascii=False) + "\n"
                                     for line in streamed(result)))

    log_message = lambda *_: None  # noqa: E731


def streamed(objects):
    """The objects, and a last one that says that these are all, or what went wrong."""
    try:
        yield from objects
        yield dict(done=True)
    except Exception as error:        # whatever it is: a reader is to see it
        yield dict(error=str(error) or repr(error))


def make_server(html, actions, port):
    """html: the path of the page. actions: such as {"POST /choose": function}"""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port: cannot use {port}: {error.strerror}") from None
    server.html, server.actions = html, actions
    return server


def serve(html, actions, cfg, note=""):
    """Until Ctrl-C."""
    with make_server(html, actions, cfg.port) as server, suppress(KeyboardInterrupt):
        page = f"http://127.0.0.1:{server.server_port}"
        print(f"page      {page} (Ctrl-C ends it{note})", flush=True)
        if cfg.open:
            webbrowser.open(page)
        server.serve_forever()
