// Reads lines of hexadecimal digits and says of the bytes of each whether JSON.parse takes them, as text.
'use strict';
const answers = [];
for (const line of require('fs').readFileSync(0, 'latin1').split('\n').slice(0, -1)) {
  const text = Buffer.from(line, 'hex').toString('utf8');
  let verdict = 'ok';
  try {
    JSON.parse(text);
  } catch {
    verdict = 'bad';
  }
  answers.push(verdict + ' ' + Buffer.from(text).toString('hex'));
}
process.stdout.write(answers.join('\n') + '\n');
