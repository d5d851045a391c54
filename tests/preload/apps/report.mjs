// The same of an ES module.
import { createRequire } from 'node:module';

createRequire(import.meta.url)('./report.cjs');
