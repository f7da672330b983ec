/**
 * A model as it was given: its graph, and where its weights are. Nothing of it is copied but nodes.
 *
 * @module
 */

import { realpathSync, statSync } from "node:fs";
import { dirname, isAbsolute, join, relative, sep } from "node:path";
import { type Bytes, bytesOf, bytesOfFile } from "./bytes.ts";
import { type GraphNode, readNode } from "./node.ts";
import { type Field, fieldsOf, intOf, textOf } from "./protobuf.ts";
import { cannotCut, damaged, nodeText } from "./refusal.ts";
import { readTensor, type Tensor } from "./tensor.ts";

/** An input or output of a graph, or what the graph says of a value in it. */
export interface ValueInfo {
  readonly name: string;
  /** The element type of a tensor; 0 where it is none or not said. */
  readonly type: number;
  /** Numbers, and names of what varies; undefined where the rank is not said. */
  readonly dims?: readonly (number | string)[];
}

/** A model, read. */
export interface Model {
  readonly bytes: Bytes;
  readonly irVersion: number;
  /** Versions of the sets of operators, by domain. */
  readonly opsets: ReadonlyMap<string, number>;
  /** Functions, as they lie in the model. */
  readonly functions: readonly Uint8Array[];
  /** Each before those that take what it gives. */
  readonly nodes: readonly GraphNode[];
  readonly weights: ReadonlyMap<string, Tensor>;
  readonly inputs: ReadonlyMap<string, ValueInfo>;
  readonly outputs: ReadonlyMap<string, ValueInfo>;
  /** What the graph says of values in it. */
  readonly values: ReadonlyMap<string, ValueInfo>;
  /** Where the model and its weights lie, where they are files. */
  readonly files?: ModelFiles;
}

/** The files of a model, links followed: what a cache of downloads has in a folder may lie anywhere. */
export interface ModelFiles {
  /** The folder that has them all, at some depth. */
  readonly folder: string;
  /** The model, relative to that folder, with `/`. */
  readonly model: string;
  /** Files of weights by the names that the model has for them. */
  readonly weights: ReadonlyMap<string, string>;
}

/** Names of the file of a model in a folder: those of exporters. */
const FILES = ["model.onnx", "onnx/model.onnx"];

/** Reads the model that lies in `source`: its bytes, the path of its file, or that of a folder with one. */
export function readModel(source: string | Uint8Array): Model {
  if (source instanceof Uint8Array) return checkAlone(readBytes(bytesOf(source)));
  if (typeof source !== "string") throw new TypeError(`model must be a path or a Uint8Array: ${typeof source}`);
  const path = fileOf(source);
  const bytes = bytesOfFile(path);
  try {
    const model = readBytes(bytes);
    return { ...model, files: filesOf(path, model) };
  } catch (error) {
    bytes.close();
    throw error;
  }
}

/** Bytes have no folder where files of weights could be. */
function checkAlone(model: Model): Model {
  const outside = [...model.weights.values()].find(({ place }) => place !== undefined)?.place;
  if (outside === undefined) return model;
  throw cannotCut(`weights in ${outside.file} lie beside a model that is a file: give its path in place of its bytes`);
}

function fileOf(path: string): string {
  const facts = statSync(path, { throwIfNoEntry: false });
  if (facts === undefined) throw damaged(`there must be a file or a folder: ${path} is not there`);
  if (facts.isFile()) return path;
  if (!facts.isDirectory()) throw damaged(`there must be a file or a folder: ${path} is neither`);
  const found = FILES.map((file) => join(path, file)).find((file) =>
    statSync(file, { throwIfNoEntry: false })?.isFile()
  );
  if (found === undefined) throw damaged(`a folder must have ${FILES.join(" or ")}: ${path} has neither`);
  return found;
}

/** Where the files of the model at `path` lie. */
function filesOf(path: string, model: Model): ModelFiles {
  const names = new Set([...model.weights.values()].flatMap(({ place }) => place?.file ?? []));
  const real = new Map([...names].sort().map((name) => [name, realFile(join(dirname(path), name), name)]));
  const own = realpathSync(path);
  let folder = dirname(own);
  const isIn = (file: string) => !relative(folder, file).startsWith("..") && !isAbsolute(relative(folder, file));
  while (![...real.values()].every(isIn) && dirname(folder) !== folder) folder = dirname(folder);
  const inFolder = (file: string) => relative(folder, file).replaceAll(sep, "/");
  return {
    folder,
    model: inFolder(own),
    weights: new Map([...real].map(([name, file]) => [name, inFolder(file)])),
  };
}

function realFile(path: string, name: string): string {
  if (statSync(path, { throwIfNoEntry: false })?.isFile()) return realpathSync(path);
  throw damaged(`the files of its weights must lie beside it: ${name} does not`);
}

function readBytes(bytes: Bytes): Model {
  let irVersion = 0;
  let graph: Field | undefined;
  const opsets = new Map<string, number>();
  const functions: Uint8Array[] = [];
  for (const field of fieldsOf(bytes)) {
    if (field.number === 1) irVersion = intOf(field);
    else if (field.number === 7) graph = field;
    else if (field.number === 8) {
      const [domain, version] = readOpset(bytes, field);
      opsets.set(domain === "ai.onnx" ? "" : domain, version);
    } else if (field.number === 25) functions.push(bytes.window(field.start, field.end).slice());
  }
  if (graph === undefined) throw damaged(`an ONNX model has a graph: none is in its ${bytes.length} bytes`);

  const nodes: GraphNode[] = [];
  const weights = new Map<string, Tensor>();
  const inputs = new Map<string, ValueInfo>();
  const outputs = new Map<string, ValueInfo>();
  const values = new Map<string, ValueInfo>();
  for (const field of fieldsOf(bytes, graph.start, graph.end)) {
    switch (field.number) {
      case 1:
        nodes.push(readNode(bytes, field));
        break;
      case 5: {
        const tensor = readTensor(bytes, field.start, field.end);
        weights.set(tensor.name, tensor);
        break;
      }
      case 11:
      case 12:
      case 13: {
        const info = readValue(bytes, field);
        (field.number === 11 ? inputs : field.number === 12 ? outputs : values).set(info.name, info);
        break;
      }
      case 15:
        throw cannotCut("weights must be dense: the graph has sparse ones; export it without them");
    }
  }
  for (const name of weights.keys()) inputs.delete(name); // before version 4 of the format they were listed there too
  checkOrder(nodes, [...weights.keys(), ...inputs.keys()]);
  return { bytes, irVersion, opsets, functions, nodes, weights, inputs, outputs, values };
}

function readOpset(bytes: Bytes, { start, end }: Field): [domain: string, version: number] {
  let domain = "";
  let version = 0;
  for (const field of fieldsOf(bytes, start, end)) {
    if (field.number === 1) domain = textOf(bytes, field);
    if (field.number === 2) version = intOf(field);
  }
  return [domain, version];
}

function readValue(bytes: Bytes, info: Field): ValueInfo {
  let name = "";
  let type = 0;
  let dims: (number | string)[] | undefined;
  for (const field of fieldsOf(bytes, info.start, info.end)) {
    if (field.number === 1) name = textOf(bytes, field);
    else if (field.number === 2) {
      for (const kind of fieldsOf(bytes, field.start, field.end)) if (kind.number === 1) readTensorType(kind);
    }
  }
  return { name, type, ...(dims === undefined ? {} : { dims }) };

  function readTensorType({ start, end }: Field): void {
    for (const field of fieldsOf(bytes, start, end)) {
      if (field.number === 1) type = intOf(field);
      else if (field.number === 2) {
        dims = [...fieldsOf(bytes, field.start, field.end)].map((dim) => {
          for (const part of fieldsOf(bytes, dim.start, dim.end)) {
            if (part.number === 1) return intOf(part);
            if (part.number === 2) return textOf(bytes, part);
          }
          return "";
        });
      }
    }
  }
}

/** Every value is made once, before it is taken. */
function checkOrder(nodes: readonly GraphNode[], given: readonly string[]): void {
  const known = new Set(["", ...given]);
  for (const node of nodes) {
    for (const input of [...node.inputs, ...node.captured]) {
      if (!known.has(input)) {
        throw damaged(`values must be made before they are taken: ${nodeText(node)} takes ${input}`);
      }
    }
    for (const output of node.outputs) {
      if (output !== "" && known.has(output)) {
        throw damaged(`values must be made once: ${nodeText(node)} makes ${output} again`);
      }
      known.add(output);
    }
  }
}
