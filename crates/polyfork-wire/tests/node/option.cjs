// Loaded through NODE_OPTIONS.
'use strict';
process.stdout.write(`loaded ${__filename}`);
