// A deployed folder in Transformers.js: its pipeline for embeddings, its model class for logits. Called as given.py says.

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, relative, resolve } from "node:path";

const [folder, batchesFile, wanted, output] = process.argv.slice(2);
// The packages lie in NODE_PATH, which only require() looks into.
const require = createRequire(import.meta.url);
const { AutoModelForSequenceClassification, AutoTokenizer, env, pipeline } = require("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = resolve(folder, "..") + "/";
const name = relative(env.localModelPath, resolve(folder));
const options = { dtype: "q8", device: "cpu" };

async function embeddings() {
  const extract = await pipeline("feature-extraction", name, options);
  return async (texts) => (await extract(texts, { pooling: "mean", normalize: true })).tolist();
}

async function logits() {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForSequenceClassification.from_pretrained(name, options);
  return async (texts) => (await model(tokenizer(texts, { padding: true, truncation: true }))).logits.tolist();
}

const run = await (wanted === "embeddings" ? embeddings() : logits());
const rows = [];
for (const texts of JSON.parse(await readFile(batchesFile, "utf-8"))) {
  rows.push(...(await run(texts)));
}
const versions = {};
for (const each of ["@huggingface/transformers", "onnxruntime-node"]) {
  const description = join(process.env.NODE_PATH, each, "package.json");
  versions[each] = JSON.parse(await readFile(description, "utf-8")).version;
}
const runtime = ["onnxruntime", versions["onnxruntime-node"]];
await writeFile(output, JSON.stringify({ file: "onnx/model_quantized.onnx", versions, runtime, rows }));
