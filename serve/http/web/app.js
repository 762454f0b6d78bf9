"use strict";
// One list of cards. At most MAX_CAPTIONS captions and MAX_RECONSTRUCTIONS reconstructions are requested at a time;
// the others wait in the browser, so that any number of files can be dropped on a server of any size.
const MAX_CAPTIONS = 4, MAX_RECONSTRUCTIONS = 2, MAX_TOASTS = 4, MAX_ATTEMPTS = 30;
const at = id => document.getElementById(id);
const base = location.pathname.replace(/\/*$/, "/"); // behind a proxy the page may have a path, also without a slash
const cards = [], clock = { busy: 0, since: 0, running: 0 };
let model = null, encoder = null, chosen = [], outdated = new AbortController(), mixing = new AbortController();

class RequestError extends Error {}

/** Runs at most `limit` jobs at a time, in their order; a job whose signal has been aborted is skipped. */
class Semaphore {
  constructor(limit) { this.free = limit; this.waiting = []; }
  async run(work, signal) {
    if (this.free === 0) await new Promise(go => this.waiting.push(go)); else this.free--;
    try {
      if (!signal.aborted) return await work();
    } finally {
      if (this.waiting.length) this.waiting.shift()(); else this.free++;
    }
  }
}
const captioning = new Semaphore(MAX_CAPTIONS), reconstructing = new Semaphore(MAX_RECONSTRUCTIONS);

const pause = (seconds, signal) => new Promise((go, stop) => {
  const timer = setTimeout(go, seconds * 1000);
  signal.addEventListener("abort", () => { clearTimeout(timer); stop(signal.reason); }, { once: true });
});

const authorization = () => at("key").value ? { Authorization: "Bearer " + at("key").value } : {};

/** Sends JSON, or a request { body, headers }; repeats it after Retry-After if the server is loading, full, or limits the rate. */
async function post(path, content, signal, json = true) {
  const { body, headers } = json
    ? { body: JSON.stringify(content), headers: { "Content-Type": "application/json" } } : content;
  Object.assign(headers, authorization());
  for (let attempt = 1; ; attempt++) {
    let answer;
    try {
      answer = await fetch(base + path, { method: "POST", body, headers, signal });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new RequestError("the server does not answer");
    }
    if (answer.ok) return answer;
    const content = await answer.json().catch(() => null);
    if (answer.status === 401) at("lock").hidden = false;
    if (![429, 503].includes(answer.status) || attempt === MAX_ATTEMPTS)
      throw new RequestError(content?.error?.message ?? `the server answers with ${answer.status}`);
    await pause(Number(answer.headers.get("Retry-After")) || 1, signal);
  }
}

/** Yields the JSON objects of a stream of server-sent events. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

const dataUrl = file => new Promise((go, stop) => {
  const reader = new FileReader();
  reader.onload = () => go(reader.result);
  reader.onerror = () => stop(new RequestError("the file cannot be read"));
  reader.readAsDataURL(file);
});

/** Returns the encoder that runs in this page; it is loaded at the first call, and again after a failure. */
function localEncoder() {
  const tell = (text, failed = false) => {
    at("encoder").textContent = text;
    at("encoder").classList.toggle("bad", failed);
  };
  const progress = (done, total) => {
    at("loaded").hidden = false;
    at("loaded").value = done / total;
    tell(`loading the encoder: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  };
  const open = async () => {
    tell("loading the encoder …");
    try {
      const { openEncoder } = await import(base + "browser/encoder.js");
      const starting = () => tell("starting the encoder …");
      const opened = await openEncoder({ headers: authorization(), progress, starting });
      tell(`photos stay in this browser, which encodes them with ${opened.provider === "webgpu" ? "WebGPU" : "WebAssembly"}`);
      return opened;
    } catch (error) {
      encoder = null;
      tell(error.message, true);
      throw new RequestError(error.message);
    } finally {
      at("loaded").hidden = true;
    }
  };
  return encoder ??= open();
}

/** Encodes the image in this page, and sends its embeddings alone. */
async function captionHere(card) {
  const start = performance.now(), opened = await localEncoder();
  const request = opened.request(await opened.encode(card.file), model?.max_tokens);
  const answer = opened.read(await (await post("v1/generate", request, card.signal, false)).json());
  card.text.textContent = answer.caption;
  finish(card, start, null, answer.caption, answer.ids.length, answer.finish_reason);
}

async function caption(card) {
  if (card.local) return captionHere(card);
  const start = performance.now();
  const content = [{ type: "image_url", image_url: { url: await dataUrl(card.file) } }];
  const body = { messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true } };
  const answer = await post("v1/chat/completions", body, card.signal);
  let text = "", first = null, tokens = 0, reason = null;
  for await (const event of events(answer)) {
    if (event.error) throw new RequestError(event.error.message);
    const choice = event.choices[0];
    if (choice?.delta.content) {
      first ??= (performance.now() - start) / 1000;
      card.text.textContent = text += choice.delta.content;
    }
    reason = choice?.finish_reason ?? reason;
    tokens = event.usage?.completion_tokens ?? tokens;
  }
  if (reason === null) throw new RequestError("the connection ended before the caption was complete");
  finish(card, start, first, text, tokens, reason);
}

/** Keeps a card's caption; start in milliseconds, first in seconds after it, null if the text came at once. */
function finish(card, start, first, text, tokens, reason) {
  const total = (performance.now() - start) / 1000;
  const round = seconds => Math.round(seconds * 1e4) / 1e4;
  card.record = {
    id: card.name, caption: text, tokens, finish_reason: reason,
    timings: { first: round(first ?? total), total: round(total) }, model: model?.id,
  };
  card.image.alt = text;
  card.copy.hidden = false;
  card.note(`${tokens} tokens, ${total.toFixed(2)} s`);
}

async function reconstruct(card) {
  const signal = AbortSignal.any([card.signal, outdated.signal]);
  if (card.local || !model?.reconstructs || !at("reconstruct").checked) return;
  const figure = card.node.querySelector(".reconstruction"), image = figure.querySelector("img");
  figure.hidden = false;
  image.className = "waiting";
  await reconstructing.run(async () => {
    const body = { images: [await dataUrl(card.file)], guidance: +at("guidance").value, steps: +at("steps").value };
    const answer = await (await post("v1/reconstructions", body, signal)).json();
    image.src = answer.image;
    image.alt = "Reconstruction from the embeddings of " + card.name;
    image.className = "";
  }, signal).catch(error => { if (!signal.aborted) { figure.hidden = true; toast(card.name, error); } });
}

function nameCopy(card, word) {
  card.copy.textContent = word;
  card.copy.setAttribute("aria-label", `${word} the caption of ${card.name}`);
}

/** Copies a caption; a page over plain HTTP has no clipboard, but may copy what is selected. */
async function copy(card) {
  try {
    await navigator.clipboard.writeText(card.record.caption);
  } catch {
    const range = document.createRange();
    range.selectNodeContents(card.text);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    if (!document.execCommand("copy")) return toast(card.name, new Error("this browser does not let pages copy"));
    getSelection().removeAllRanges();
  }
  nameCopy(card, "Copied");
  setTimeout(nameCopy, 2000, card, "Copy");
}

function work(card) {
  card.node.className = "";
  card.node.setAttribute("aria-busy", "true");
  card.text.textContent = "waiting …";
  card.record = card.failed = null;
  card.again.hidden = card.copy.hidden = true;
  captioning.run(async () => {
    if (clock.running++ === 0) clock.since = performance.now();
    card.text.textContent = "…";
    try { await caption(card); } finally {
      if (--clock.running === 0) clock.busy += performance.now() - clock.since;
    }
  }, card.signal).then(() => reconstruct(card), error => {
    if (card.signal.aborted) return;
    card.failed = error.message;
    card.node.className = "failed";
    card.text.textContent = `Failed: ${error.message}`;
    card.again.hidden = false;
    toast(card.name, error);
  }).finally(() => { card.node.removeAttribute("aria-busy"); show(); });
  show();
}

function add(files) {
  for (const file of files) {
    const node = at("card").content.cloneNode(true).firstElementChild, stop = new AbortController();
    const same = cards.filter(card => card.file.name === file.name).length;
    const card = {
      file, node, signal: stop.signal, local: at("local").checked, name: same ? `${file.name} (${same + 1})` : file.name,
      text: node.querySelector(".caption"), again: node.querySelector(".again"), image: node.querySelector("img"),
      copy: node.querySelector(".copy"),
      note: text => { node.querySelector("small").textContent = text ? `${card.name} · ${text}` : card.name; },
    };
    card.note("");
    card.image.src = URL.createObjectURL(file);
    card.image.alt = card.name;
    card.again.onclick = () => work(card);
    card.copy.onclick = () => copy(card);
    const remove = node.querySelector(".remove"), mix = node.querySelector(".mix");
    remove.setAttribute("aria-label", `Remove ${card.name}`);
    nameCopy(card, "Copy");
    mix.setAttribute("aria-label", `Mix ${card.name} with another image`);
    card.remove = () => {
      stop.abort();
      URL.revokeObjectURL(card.image.src);
      cards.splice(cards.indexOf(card), 1);
      choose(card, false);
      node.remove();
      show();
    };
    remove.onclick = () => {
      const next = node.nextElementSibling ?? node.previousElementSibling;
      card.remove();
      (next?.querySelector(".remove") ?? at("files")).focus();
    };
    mix.onchange = () => choose(card, mix.checked);
    if (card.local) mix.parentElement.remove(); // the server would need the image
    node.setAttribute("aria-label", card.name);
    cards.push(card);
    at("cards").append(node);
    work(card);
  }
}

/** Adds a card to the mixture, or removes it; a third card replaces the one that was added first. */
function choose(card, selected) {
  chosen = chosen.filter(other => other !== card);
  if (selected) chosen = [...chosen, card].slice(-2);
  for (const each of cards) if (!each.local) each.node.querySelector(".mix").checked = chosen.includes(each);
  mix();
}

async function mix() {
  mixing.abort();
  mixing = new AbortController();
  at("mixing").hidden = chosen.length < 2;
  if (chosen.length < 2) return;
  const signal = mixing.signal, [from, to] = chosen;
  for (const [image, name, card] of [["mixfrom", "fromname", from], ["mixto", "toname", to]]) {
    at(image).src = card.image.src;
    at(image).alt = at(name).textContent = card.name;
  }
  at("mixed").className = "waiting";
  try {
    await pause(0.15, signal); // a slider that is still moving
    const images = [await dataUrl(from.file), await dataUrl(to.file)];
    const how = document.querySelector("[name=mix]:checked").value;
    const body = { images, share: at("share").value / 100, mix: how, guidance: +at("guidance").value, steps: +at("steps").value };
    const answer = await (await post("v1/reconstructions", body, signal)).json();
    if (signal.aborted) return;
    at("mixed").src = answer.image;
    at("mixcaption").textContent = answer.caption;
  } catch (error) {
    if (signal.aborted) return;
    at("mixcaption").textContent = "";
    toast("mixing", error);
  }
  at("mixed").className = "";
}

function toast(name, error) {
  const node = at("toast").content.cloneNode(true).firstElementChild;
  node.querySelector("span").textContent = `${name}: ${error.message}`;
  node.querySelector("button").onclick = () => node.remove();
  at("toasts").append(node);
  while (at("toasts").children.length > MAX_TOASTS) at("toasts").firstElementChild.remove();
}

const median = values => values.length ? values.toSorted((a, b) => a - b)[values.length >> 1] : null;

function show() {
  const records = cards.map(card => card.record).filter(Boolean), failed = cards.filter(card => card.failed).length;
  const busy = (clock.busy + (clock.running ? performance.now() - clock.since : 0)) / 1000;
  const rate = count => busy && count ? (count / busy).toFixed(1) : "–";
  const seconds = which => median(records.map(r => r.timings[which]))?.toFixed(2).concat(" s") ?? "–";
  const texts = {
    done: `${records.length} of ${cards.length}`, failed, rate: rate(records.length),
    tokens: rate(records.reduce((sum, r) => sum + r.tokens, 0)), first: seconds("first"), total: seconds("total"),
  };
  for (const [id, text] of Object.entries(texts)) at(id).textContent = text;
  at("download").disabled = !records.length;
  at("clear").disabled = !cards.length;
  if (model && cards.length && records.length + failed === cards.length)
    at("status").textContent = `${records.length} captioned, ${failed} failed.`;
  else if (model && cards.length) at("status").textContent = `Captioning ${cards.length} images.`;
}

function download() {
  const lines = cards.filter(card => card.record).map(card => JSON.stringify(card.record) + "\n");
  const link = Object.assign(document.createElement("a"), { download: "captions.jsonl" });
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Reads the model's name and whether it can reconstruct; called again when a key has been entered. */
async function connect() {
  for (;;) {
    try {
      const answer = await fetch(base + "v1/models", { headers: authorization() });
      if (answer.status === 401) {
        at("lock").hidden = false;
        at("status").textContent = "This server asks for an API key.";
        return;
      }
      const ready = await fetch(base + "ready");
      if (answer.ok && ready.ok) {
        model = (await answer.json()).data[0];
        at("status").textContent = `Model ${model.id}. Images are sent to this server only.`;
        for (const node of [...document.querySelectorAll(".reconstructs")]) node.hidden = !model.reconstructs;
        at("card").content.querySelector(".reconstructs").hidden = !model.reconstructs;
        at("keep").hidden = !model.encodes;
        return show();
      }
      at("status").textContent = "The models are being loaded …";
    } catch {
      at("status").textContent = "The server does not answer.";
    }
    await new Promise(go => setTimeout(go, 1000));
  }
}

at("files").onchange = () => { add(at("files").files); at("files").value = ""; };
at("download").onclick = download;
at("clear").onclick = () => { for (const card of [...cards]) card.remove(); at("files").focus(); };
at("key").onchange = connect;
at("local").onchange = () => { if (at("local").checked) localEncoder().catch(() => {}); };
at("settings").onsubmit = event => event.preventDefault();
at("guidance").oninput = () => { at("strength").textContent = at("guidance").value; };
at("share").oninput = () => { at("percent").textContent = at("share").value + " %"; mix(); };
for (const radio of document.getElementsByName("mix")) radio.onchange = mix;
for (const id of ["guidance", "steps", "reconstruct"])
  at(id).onchange = () => {
    outdated.abort();
    outdated = new AbortController();
    for (const card of cards) {
      if (!at("reconstruct").checked) card.node.querySelector(".reconstruction").hidden = true;
      if (card.record) reconstruct(card);
    }
    mix();
  };
document.addEventListener("dragover", event => { event.preventDefault(); at("drop").classList.add("over"); });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
document.addEventListener("drop", event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", event => add(event.clipboardData.files));
document.addEventListener("keydown", event => { if (event.key === "Escape") at("toasts").lastElementChild?.remove(); });
setInterval(() => { if (clock.running) show(); }, 250);
connect();
