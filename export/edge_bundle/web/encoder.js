// Encode images in a page with ONNX Runtime: on the GPU by WebGPU where there is one, else by WebAssembly.
//
//   const encoder = await openEncoder({ progress: (done, total) => …, starting: () => … });
//   const { body, headers } = encoder.request(await encoder.encode(file));   // a POST to v1/generate
//   const { caption, ids } = encoder.read(await answer.json());
//
// Only embeddings leave the page (README.md: "What happens to an image"): safetensors with one tensor `embeds`
// [queries, width] in bfloat16. The answer holds token ids, which are decoded here. web.json, beside this file, names
// what is loaded; the browser's cache keeps it under its hash.

/** A problem that the page shows as it is, in one sentence. */
export class PageError extends Error {}

const BASE = new URL(".", import.meta.url), CACHE = "vlv";
// of ONNX Runtime, by execution provider: the module and the program that it loads. That of WebGPU has no float64, which
// the crop needs, so the crop is always made by the other one.
const LIBRARIES = {
  webgpu: ["ort/ort.webgpu.min.mjs", "ort/ort-wasm-simd-threaded.asyncify.wasm"],
  wasm: ["ort/ort.wasm.min.mjs", "ort/ort-wasm-simd-threaded.wasm"],
};
/** A module that has one SIMD instruction: valid where WebAssembly SIMD is there. */
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15,
  253, 98, 11);

/** Load the encoder and start it. progress: gets the bytes loaded and all; headers: of the requests. Throws PageError. */
export async function openEncoder({ headers = {}, progress = () => {}, starting = () => {} } = {}) {
  if (!globalThis.WebAssembly || !WebAssembly.validate(SIMD))
    throw new PageError("This browser has no WebAssembly SIMD, which the encoder needs: use a newer one.");
  try {
    const answer = await fetch(new URL("web.json", BASE), { cache: "no-cache", headers });
    if (!answer.ok) throw new PageError(`The encoder cannot be loaded (${answer.status}).`);
    const about = await answer.json(), gpu = about.webgpu && await navigator.gpu?.requestAdapter().catch(() => null);
    for (const provider of gpu ? ["webgpu", "wasm"] : ["wasm"]) {
      const encoder = new Encoder(about, provider);
      await encoder.load(headers, progress);
      starting();
      try {
        await encoder.start();
        return encoder;
      } catch (error) {
        if (provider === "wasm") throw error;
        console.warn(`WebGPU cannot be used: ${error.message}`);
      }
    }
  } catch (error) {
    if (error instanceof PageError) throw error;
    const memory = error instanceof RangeError || /memory|allocat|abort/i.test(error.message);
    throw new PageError(memory ? "There is too little memory for the encoder: close other pages." : error.message);
  }
}

class Encoder {
  constructor(about, provider) {
    Object.assign(this, { about, provider, settings: about.settings, loaded: 0, queue: Promise.resolve() });
  }

  /** Load the files; `loaded` counts the bytes that were not in the cache. One that fails ends the others. */
  async load(headers, progress) {
    const names = Object.keys(this.about.files).filter(name => !name.startsWith("ort/"));
    names.push(...new Set([LIBRARIES.wasm[1], LIBRARIES[this.provider][1]]));
    const total = names.reduce((sum, name) => sum + this.about.files[name].bytes, 0);
    const stop = new AbortController(), request = { headers, signal: stop.signal };
    const count = bytes => {
      this.loaded += bytes;
      if (!stop.signal.aborted) progress(this.loaded, total);
    };
    const contents = await Promise.all(names.map(name => load(name, this.about.files[name], request, count)))
      .catch(error => { stop.abort(); throw error; });
    this.files = Object.fromEntries(names.map((name, i) => [name, contents[i]]));
  }

  /** Return the library for an execution provider. */
  async library(provider) {
    const [module, program] = LIBRARIES[provider], ort = await import(new URL(module, BASE).href);
    ort.env.wasm.wasmBinary = this.files[program];
    ort.env.wasm.numThreads = 1; // more need headers that isolate the page from others
    return ort;
  }

  /** Start ONNX Runtime; WebGPU has to give the embeddings that were recorded. */
  async start() {
    this.ort = await this.library("wasm");
    this.cropping = await this.ort.InferenceSession.create(this.files["crop.onnx"]);
    this.encoding = await this.library(this.provider);
    const weights = Object.keys(this.files).filter(name => name.endsWith(".data"));
    this.session = await this.encoding.InferenceSession.create(this.files["encoder.onnx"], {
      executionProviders: [this.provider], externalData: weights.map(path => ({ path, data: this.files[path] })),
    });
    if (this.provider === "webgpu") await this.check();
    this.text = decoder(JSON.parse(new TextDecoder().decode(this.files["tokenizer.json"])));
    this.files = null;
  }

  async check() {
    const size = +this.settings.image_size, crop = this.files["check.ppm"].slice(-3 * size * size);
    const found = await this.run(new this.ort.Tensor("uint8", crop, [size, size, 3]));
    const recorded = new Float32Array(this.files["check.f32"].buffer);
    const largest = recorded.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const right = found.data.length === recorded.length && recorded.every(
      (value, i) => Math.abs(found.data[i] - value) <= +this.settings.tolerance * largest);
    if (!right) throw new Error("its embeddings are not those of the CPU");
  }

  /** Return the embeddings float32 [1, queries, width] of an image uint8 [height, width, 3]. */
  async run(image) {
    const { crop } = await this.cropping.run({ image });
    const pixels = new this.encoding.Tensor("uint8", crop.data, crop.dims);
    return (await this.session.run({ pixels }, ["prompts"])).prompts;
  }

  /** Return an image file's embeddings, float32 [1, queries, width]; images wait for each other. Throws PageError. */
  encode(file) {
    const encoded = this.queue.then(async () => this.run(await this.pixels(file)));
    this.queue = encoded.catch(() => {});
    return encoded;
  }

  /** Return an image file's pixels, upright, in sRGB, on white: uint8 [height, width, 3]. */
  async pixels(file) {
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
    return new this.ort.Tensor("uint8", rgb, [height, width, 3]);
  }

  /** Return the body and headers of a POST to v1/generate, for a caption of at most `limit` tokens. */
  request(embeddings, limit = Infinity) {
    const sampling = { max_tokens: Math.min(limit, +this.settings.max_new_tokens) };
    const headers = { "Content-Type": "application/octet-stream", "X-VLV-Sampling": JSON.stringify(sampling) };
    return { body: safetensors(embeddings), headers };
  }

  /** Return the caption, its token ids and how it ended, of the answer to a request. */
  read({ choices: [{ token_ids, finish_reason }] }) {
    const ends = new Set(this.settings.end_tokens.split(" ").map(Number)), ids = token_ids.filter(id => !ends.has(id));
    return { caption: clean(this.text(ids)), ids, finish_reason };
  }
}

/** Return a file's content: from this browser's cache if it is there in this version, else loaded with progress. */
async function load(name, { sha256, bytes }, request, loaded) {
  const url = new URL(`${name}?${sha256.slice(0, 16)}`, BASE);
  const cache = await globalThis.caches?.open(CACHE); // there is none in a page without TLS
  const kept = await cache?.match(url);
  if (kept) return new Uint8Array(await kept.arrayBuffer());
  const answer = await fetch(url, request);
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
  if (cache) {
    for (const old of await cache.keys()) if (new URL(old.url).pathname === url.pathname) await cache.delete(old);
    await cache.put(url, new Response(content)).catch(() => {}); // no room: it is loaded again next time
  }
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
