// Encode images in this page with ONNX Runtime, and let a gateway's language model write the captions.
//
// The gateway gets embeddings alone (README.md: "What happens to an image"): safetensors with one tensor `embeds`
// [queries, width] in bfloat16. It answers with token ids, which are decoded here. Its address is the field on the page,
// at first that of ?gateway=… or of this page's own server.

import * as ort from "./ort/ort.wasm.min.mjs";

const at = id => document.getElementById(id);
const state = { session: null, tokens: null, settings: null, cards: [], queue: Promise.resolve() };
window.captions = state; // for those who drive the page

class PageError extends Error {}

/** A module that has one SIMD instruction: valid where WebAssembly SIMD is there. */
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15,
  253, 98, 11);

function status(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

/** Return a file's content: from this browser's cache if it is there in this version, else loaded with progress. */
async function load(name, { sha256, bytes }, loaded) {
  const url = new URL(`${name}?${sha256.slice(0, 16)}`, location.href), cache = await caches.open("vlv");
  const kept = await cache.match(url);
  if (kept) return new Uint8Array(await kept.arrayBuffer());
  const answer = await fetch(url);
  if (!answer.ok) throw new PageError(`${name} cannot be loaded (${answer.status})`);
  const content = new Uint8Array(bytes), reader = answer.body.getReader();
  for (let place = 0; ;) {
    const { done, value } = await reader.read();
    if (done && place === bytes) break;
    if (done || place + value.length > bytes) throw new PageError(`${name} is not the file that was exported`);
    content.set(value, place);
    place += value.length;
    loaded(value.length);
  }
  for (const old of await cache.keys()) if (new URL(old.url).pathname === url.pathname) await cache.delete(old);
  await cache.put(url, new Response(content));
  return content;
}

/** Return what decodes token ids: the tokenizer's byte-level vocabulary. */
function decoder(tokenizer) {
  const bytes = new Map(), pieces = [], encoder = new TextEncoder();
  for (let byte = 0, next = 256; byte < 256; byte++) {
    const shown = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    bytes.set(String.fromCodePoint(shown ? byte : next++), byte);
  }
  for (const [text, id] of Object.entries(tokenizer.model.vocab)) pieces[id] = [...text].map(c => bytes.get(c));
  for (const { id, content } of tokenizer.added_tokens) pieces[id] = [...encoder.encode(content)];
  return ids => new TextDecoder().decode(Uint8Array.from(ids.flatMap(id => pieces[id] ?? [])));
}

/** Return the caption: cut at its last period, without repeated sentences. */
function clean(text) {
  text = text.trim();
  if (text.includes(".")) text = text.slice(0, text.lastIndexOf(".") + 1);
  return [...new Set(text.split(/(?<=[.!?])\s+/))].join(" ");
}

/** Return an image file's pixels, upright, in sRGB, on white: uint8 [height, width, 3]. */
export async function pixels(file) {
  let image;
  try {
    image = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new PageError("this browser cannot read the image");
  }
  const { width, height } = image, context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0);
  image.close();
  const rgba = context.getImageData(0, 0, width, height).data, rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from];
    rgb[to++] = rgba[from + 1];
    rgb[to++] = rgba[from + 2];
  }
  return new ort.Tensor("uint8", rgb, [height, width, 3]);
}

/** Return embeddings float32 [1, queries, width] as safetensors in bfloat16, rounded to the nearest even. */
function safetensors({ data, dims: [, queries, width] }) {
  const bits = new Uint32Array(data.buffer, data.byteOffset, data.length), halves = new Uint16Array(data.length);
  bits.forEach((value, i) => { halves[i] = (value + 0x7fff + ((value >>> 16) & 1)) >>> 16; });
  const tensor = { dtype: "BF16", shape: [queries, width], data_offsets: [0, halves.byteLength] };
  let header = JSON.stringify({ embeds: tensor });
  header += " ".repeat(-header.length & 7);
  const length = new BigUint64Array([BigInt(header.length)]);
  return new Blob([length, header, halves]);
}

async function generate(embeddings) {
  const address = new URL("v1/generate", at("gateway").value.replace(/\/*$/, "/"));
  const headers = { "Content-Type": "application/octet-stream" };
  headers["X-VLV-Sampling"] = JSON.stringify({ max_tokens: +state.settings.max_new_tokens });
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch(address, { method: "POST", headers, body: safetensors(embeddings) })
    .catch(() => { throw new PageError(`the gateway ${address.origin} does not answer, or does not allow this page`); });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new PageError(content.error?.message ?? `the gateway answers ${answer.status}`);
  const ends = new Set(state.settings.end_tokens.split(" ").map(Number));
  return content.choices[0].token_ids.filter(id => !ends.has(id));
}

/** Encode one image after the other; captions are written at the same time. */
function add(file) {
  const node = at("card").content.cloneNode(true).firstElementChild, card = { name: file.name, node };
  const image = node.querySelector("img"), text = node.querySelector(".caption"), note = node.querySelector("small");
  image.src = URL.createObjectURL(file);
  note.textContent = file.name;
  at("cards").append(node);
  state.cards.push(card);
  const encoded = state.queue.then(async () => {
    text.textContent = "encoding …";
    const start = performance.now(), input = await pixels(file);
    const { embeddings } = await state.session.run({ image: input }, ["embeddings"]);
    card.seconds = (performance.now() - start) / 1000;
    return embeddings;
  });
  state.queue = encoded.catch(() => {});
  card.done = encoded.then(generate).then(ids => {
    card.caption = text.textContent = image.alt = clean(state.tokens(ids));
    note.textContent = `${file.name} · encoded in ${card.seconds.toFixed(2)} s, ${ids.length} tokens`;
  }).catch(error => {
    node.className = "failed";
    card.failed = text.textContent = error.message;
  });
}

async function start() {
  if (!globalThis.WebAssembly || !WebAssembly.validate(SIMD))
    throw new PageError("This browser has no WebAssembly SIMD, which the encoder needs: use a newer one.");
  const about = await (await fetch("web.json")).json();
  state.settings = about.settings;
  at("gateway").value = new URLSearchParams(location.search).get("gateway") ?? about.gateway ?? location.origin;
  const total = Object.values(about.files).reduce((sum, file) => sum + file.bytes, 0);
  let sum = 0;
  const loaded = bytes => {
    sum += bytes;
    at("progress").hidden = false;
    at("progress").value = sum / total;
    status(`Loading the encoder: ${(sum / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  };
  const names = Object.keys(about.files);
  const contents = await Promise.all(names.map(name => load(name, about.files[name], loaded)));
  const file = Object.fromEntries(names.map((name, i) => [name, contents[i]]));
  state.loaded = sum; // bytes that were not in the cache
  ort.env.wasm.wasmBinary = file["ort/ort-wasm-simd-threaded.wasm"];
  ort.env.wasm.numThreads = 1; // more need headers that isolate the page from others
  status("Starting the encoder …");
  try {
    const weights = names.filter(name => name.endsWith(".data")).map(path => ({ path, data: file[path] }));
    const options = { executionProviders: ["wasm"], externalData: weights };
    state.session = await ort.InferenceSession.create(file["encoder.onnx"], options);
  } catch (error) {
    const memory = /memory|allocat|abort/i.test(error.message);
    throw new PageError(memory ? "There is too little memory for the encoder: close other pages." : error.message);
  }
  state.tokens = decoder(JSON.parse(new TextDecoder().decode(file["tokenizer.json"])));
  at("progress").hidden = true;
  at("files").disabled = false;
  at("files").onchange = () => { [...at("files").files].forEach(add); at("files").value = ""; };
  status("Ready.");
}

start().catch(error => status(error.message, true));
