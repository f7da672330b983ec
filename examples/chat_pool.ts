/**
 * Many conversations over one system prompt, in one cache that finds what it has of a prompt by its tokens.
 *
 *     deno run -A examples/chat_pool.ts
 *     bun examples/chat_pool.ts --conversations 20 --turns 3
 *
 * It tells how much was found, and what that saved in tokens, bytes and time. The last conversation is computed a second
 * time without any of it, in fresh caches: were its text another one, the program would say so and exit with 1.
 *
 * chat.ts holds the conversations, chat_report.ts counts what they took.
 */
import process from "node:process";
import { UsageError } from "./arguments.ts";
import { chat, chatCold, mostTokens, newChatCache } from "./chat.ts";
import { chatHelpText, parseChatOptions } from "./chat_options.ts";
import { chatReport, chatText } from "./chat_report.ts";
import { runProgram } from "./program.ts";
import { Terminal } from "./terminal.ts";
import { loadZiglet } from "./ziglet.ts";

if (import.meta.main) await runProgram("chat_pool.ts", main);

async function main(args: string[]): Promise<void> {
  const options = parseChatOptions(args);
  if (options === "help") {
    new Terminal({ quiet: true }).line(chatHelpText().trimEnd());
    return;
  }
  const ziglet = loadZiglet(options.modelDirectory);
  const { maxSeqLen } = ziglet.config;
  const most = mostTokens(options);
  if (most > maxSeqLen) {
    throw new UsageError(
      `--system, --turns and --tokens make conversations of up to ${most} bytes, ` +
        `the model's context has room for ${maxSeqLen}`,
    );
  }
  const terminal = new Terminal({ quiet: options.json });
  using held = newChatCache(ziglet, options);

  const { turns, texts } = await chat(ziglet, held, options, ({ conversation, turn }) => {
    const counts = [
      `turn ${turn + 1} of ${options.turns}`,
      `conversation ${conversation + 1} of ${options.conversations}`,
    ];
    return terminal.status(() => ({ counts, details: [] }));
  });
  const last = options.conversations - 1;
  const cold = await chatCold(ziglet, last, options);

  const report = chatReport(options, { turns, texts, paged: held.paged, cold });
  terminal.finish({ counts: [`${turns.length} answers`], details: [] });
  if (options.json) terminal.line(JSON.stringify(report));
  else terminal.text(chatText(report, new TextDecoder().decode(texts[last]!.subarray(1))));
  if (!report.sameText) process.exitCode = 1;
}
