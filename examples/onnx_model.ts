/** A language model from a folder as model hubs have it: an ONNX file, a tokenizer, and how a message becomes a prompt. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { OnnxDecoder, type OnnxDecoderOptions, type Ort } from "../src/onnx.ts";
import { UsageError } from "./arguments.ts";
import { loadPackage } from "./packages.ts";

/** The part of `@huggingface/tokenizers` that is used. */
interface Tokenizers {
  readonly Tokenizer: new (tokenizer: unknown, config: unknown) => {
    encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
    decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  };
}

/** The part of `@huggingface/jinja` that is used. */
interface Jinja {
  readonly Template: new (template: string) => { render(values: Record<string, unknown>): string };
}

/** A model that writes text. */
export interface OnnxModel extends AsyncDisposable {
  readonly decoder: OnnxDecoder;
  /** The tokens of a prompt, which is a message to the model where it has a template for those. */
  encode(prompt: string): number[];
  decode(tokens: number[]): string;
}

/** Loads the model of a folder; with `plain` prompts are no messages. */
export async function openOnnxModel(
  folder: string,
  { plain, ...options }: { plain: boolean } & Omit<OnnxDecoderOptions, "ort">,
): Promise<OnnxModel> {
  const tokenizerJson = readJson(folder, "tokenizer.json");
  if (tokenizerJson === undefined) throw new UsageError(`${folder} has no tokenizer.json`);
  const config = (readJson(folder, "tokenizer_config.json") ?? {}) as Record<string, unknown>;
  const { Tokenizer } = await loadPackage("@huggingface/tokenizers") as Tokenizers;
  const tokenizer = new Tokenizer(tokenizerJson, config);
  const template = plain ? undefined : templateOf(folder, config);
  const render = template === undefined ? undefined : await renderer(template, config);
  const decoder = await OnnxDecoder.load(folder, { ort: await loadPackage("onnxruntime-node") as Ort, ...options });
  return {
    decoder,
    encode: (prompt) =>
      render === undefined
        ? tokenizer.encode(prompt, { add_special_tokens: true }).ids
        : tokenizer.encode(render(prompt), { add_special_tokens: false }).ids, // the template has them
    // Spaces that go once more tokens are there would change what has been written.
    decode: (tokens) => tokenizer.decode(tokens, { skip_special_tokens: true, clean_up_tokenization_spaces: false }),
    [Symbol.asyncDispose]: () => decoder.free(),
  };
}

/** What makes a prompt of a message. */
async function renderer(template: string, config: Record<string, unknown>): Promise<(message: string) => string> {
  const { Template } = await loadPackage("@huggingface/jinja") as Jinja;
  const compiled = new Template(template);
  const specials = Object.entries(config).filter(([name]) => /^(bos|eos|unk|pad)_token$/.test(name))
    .map(([name, token]) => [name, (token as { content?: string } | null)?.content ?? token]);
  return (message) =>
    compiled.render({
      ...Object.fromEntries(specials),
      messages: [{ role: "user", content: message }],
      add_generation_prompt: true,
    });
}

/** The model's template of a conversation, in Jinja's language: in a file, or in the configuration of the tokenizer. */
function templateOf(folder: string, { chat_template: given }: Record<string, unknown>): string | undefined {
  const path = join(folder, "chat_template.jinja");
  if (existsSync(path)) return readFileSync(path, "utf8");
  if (typeof given === "string") return given;
  if (!Array.isArray(given)) return undefined;
  return given.find(({ name }) => name === "default")?.template;
}

function readJson(folder: string, name: string): unknown {
  const path = join(folder, name);
  if (!existsSync(path)) return undefined;
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new UsageError(`${path} is no JSON: ${error instanceof Error ? error.message : error}`);
  }
}
