// Deno's way: TypeScript, node:http through its compatibility layer (the cluster channel works there).
import http from "node:http";
import answers from "./answers.cjs";

answers.listen(answers.counted(http.createServer(answers.answer)));
