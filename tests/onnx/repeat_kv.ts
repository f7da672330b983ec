/**
 * Keys and values as exporters write them where no node does it: heads turned outward, joined to the past, and repeated for
 * each of the query heads that share them.
 */
import type { Builder } from "./builder.ts";
import { pastInput, presentOutput } from "./gqa.ts";
import { lengthOf } from "./mask.ts";

/** `[batch, tokens, head * headDim]` as `[batch, head, tokens, headDim]`. */
export function headsOutward(builder: Builder, name: string, x: string): string {
  const list = (part: string, value: string, axis: number) =>
    builder.node("Unsqueeze", `${name}/${part}/Unsqueeze`, [
      lengthOf(builder, `${name}/${part}`, value, axis),
      builder.integers([0]),
    ]);
  const dims = [list("batch", x, 0), list("tokens", x, 1), builder.integers([-1])];
  dims.push(builder.integers([builder.shape.headDim]));
  const shape = builder.node("Concat", `${name}/Concat`, dims, { axis: 0 });
  const heads = builder.node("Reshape", `${name}/Reshape`, [x, shape]);
  return builder.node("Transpose", `${name}/Transpose`, [heads], { perm: [0, 2, 1, 3] });
}

/** A layer's past keys or values and the new ones, `[batch, kv_head, total, headDim]`: its present, too. */
export function joinedPast(builder: Builder, name: string, layer: number, side: string, heads: string): string {
  const past = pastInput(builder, layer, side);
  return builder.graph.node("Concat", [past, heads], presentOutput(builder, layer, side), {
    name: `${name}/Concat_past`,
    attributes: { axis: 2 },
  });
}

/** `[batch, kv_head, total, headDim]` with each head as often as it has query heads, `[batch, q_head, total, headDim]`. */
export function repeatedHeads(builder: Builder, name: string, x: string): string {
  const { qHeadCount, kvHeadCount } = builder.shape;
  if (qHeadCount === kvHeadCount) return x;
  const repeats = qHeadCount / kvHeadCount;
  const dims = [0, 1, 2, 3].map((axis) =>
    builder.node("Unsqueeze", `${name}/repeat/${axis}/Unsqueeze`, [
      lengthOf(builder, `${name}/repeat/${axis}`, x, axis),
      builder.integers([0]),
    ])
  );
  const [batch, heads, total, headDim] = dims as [string, string, string, string];
  const wanted = [batch, heads, builder.integers([repeats]), total, headDim];
  const five = builder.node("Concat", `${name}/repeat/Concat`, wanted, { axis: 0 });
  // Expand takes 1 where a length stays, and the exporter does not know that no length is -1.
  const ones = builder.node("ConstantOfShape", `${name}/repeat/ConstantOfShape`, [
    builder.node("Shape", `${name}/repeat/Shape`, [five]),
  ], { value: { tensor: { type: "int64", dims: [1], data: BigInt64Array.of(1n) } } });
  const negative = builder.node("Mul", `${name}/repeat/Mul`, [ones, builder.integers(-1)]);
  const isOpen = builder.node("Equal", `${name}/repeat/Equal`, [five, negative]);
  const target = builder.node("Where", `${name}/repeat/Where`, [isOpen, ones, five]);
  const apart = builder.node("Unsqueeze", `${name}/repeat/Unsqueeze`, [x, builder.integers([2])]);
  const expanded = builder.node("Expand", `${name}/repeat/Expand`, [apart, target]);
  const headCount = builder.node("Mul", `${name}/repeat/Mul_1`, [heads, builder.integers([repeats])]);
  const four = builder.node("Concat", `${name}/repeat/Concat_1`, [batch, headCount, total, headDim], { axis: 0 });
  return builder.node("Reshape", `${name}/repeat/Reshape`, [expanded, four]);
}
