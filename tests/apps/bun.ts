// Bun's way: Bun.serve, which binds for itself and shares the port with reuse-port.
let n = 0;
const worker = Number(process.env.NODE_UNIQUE_ID) || null;

Bun.serve({
  port: Number(process.argv[2] ?? process.env.PORT ?? 3000),
  hostname: process.env.HOST,
  reusePort: true,
  async fetch(request) {
    const url = new URL(request.url);
    const ms = Number(url.searchParams.get("ms") ?? 0);
    const body: Record<string, unknown> = { pid: process.pid, worker, n: ++n };
    switch (url.pathname) {
      case "/slow": await Bun.sleep(ms); break;
      case "/spin": Bun.sleepSync(ms); break;
      case "/crash": process.exit(Number(url.searchParams.get("code") ?? 0));
      case "/env": body.value = process.env[url.searchParams.get("name") ?? ""] ?? null; break;
    }
    return Response.json(body);
  },
});
