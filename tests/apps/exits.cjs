// Exits at once with CODE (default 1), after a last word on stderr.
'use strict';
console.error('exits.cjs: leaving at once');
process.exit(Number(process.env.CODE ?? 1));
