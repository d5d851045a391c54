// Throws while it starts: a syntax slip, a missing module, a bad configuration.
'use strict';
throw new Error('throws.cjs: broken at start');
