// Starts well and lives, but never opens a port: a version that does not come up.
'use strict';
setInterval(() => {}, 1 << 30);
