#!/bin/sh
# A PM2 user's morning: two apps of an ecosystem.config.js started, listed, scaled, reloaded, a bad deploy refused, logs
# followed, stopped. Needs polyfork and node in PATH. Works on a copy, so that the bad deploy spoils nothing.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'polyfork stop --all >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
cp "$here"/*.js "$work"
cd "$work"
# Apps and logs of their own, so that this is nobody else's morning.
export POLYFORK_RUNTIME_DIR="$work/runtime" POLYFORK_LOG_DIR="$work/logs"
: "${SHOP_PORT:=3000}"
export SHOP_PORT

say() { printf '\n$ %s\n' "$*"; "$@"; }
ask() { node -e "fetch('http://127.0.0.1:$SHOP_PORT/').then((r) => r.text()).then((t) => process.stdout.write(t))"; }

# What becomes of each key, and whether everything is there.
say polyfork check

# PM2: pm2 start ecosystem.config.js
say polyfork start ecosystem.config.js
say polyfork ls
ask

# PM2: pm2 scale shop 3
say polyfork scale shop 3

# A new version. PM2: pm2 reload shop
sed -i 's/shop 1/shop 2/' shop.js
say polyfork reload shop
ask

# A version that does not start: it is refused, says why, and the one before goes on.
cp shop.js good.js
echo "throw new Error('forgot to finish this')" > shop.js
if say polyfork reload shop; then
  echo 'the bad deploy was taken' >&2
  exit 1
fi
ask
cp good.js shop.js

# What the file says against what runs: shop was scaled by hand and has a newer program.
say polyfork apply --dry-run
say polyfork apply

# PM2: pm2 logs. Both in the order of time.
say polyfork logs shop mail -n 40

# PM2: pm2 delete all
say polyfork stop --all
say polyfork ls
