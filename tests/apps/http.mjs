// The same server as an ES module, with a top-level await before it listens.
import http from 'node:http';
import { setImmediate } from 'node:timers/promises';
import answers from './answers.cjs';

await setImmediate();
answers.listen(answers.counted(http.createServer(answers.answer)));
