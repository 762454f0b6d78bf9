// The page: choose images, encode them here, and let a gateway's language model write the captions. Its address is the
// field on the page, at first that of ?gateway=… or of this page's own server.

import { openEncoder, PageError } from "./encoder.js";

const at = id => document.getElementById(id);
const state = { encoder: null, cards: [] };
window.captions = state; // for those who drive the page

function status(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

async function generate(embeddings) {
  const address = new URL("v1/generate", at("gateway").value.replace(/\/*$/, "/"));
  const { body, headers } = state.encoder.request(embeddings);
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch(address, { method: "POST", headers, body })
    .catch(() => { throw new PageError(`the gateway ${address.origin} does not answer, or does not allow this page`); });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new PageError(content.error?.message ?? `the gateway answers ${answer.status}`);
  return state.encoder.read(content);
}

/** Encode one image after the other; captions are written at the same time. */
function add(file) {
  const node = at("card").content.cloneNode(true).firstElementChild, card = { name: file.name, node };
  const image = node.querySelector("img"), text = node.querySelector(".caption"), note = node.querySelector("small");
  image.src = URL.createObjectURL(file);
  note.textContent = file.name;
  at("cards").append(node);
  state.cards.push(card);
  card.done = state.encoder.encode(file).then(generate).then(({ caption, ids }) => {
    card.caption = text.textContent = image.alt = caption;
    note.textContent = `${file.name} · ${ids.length} tokens`;
  }).catch(error => {
    node.className = "failed";
    card.failed = text.textContent = error.message;
  });
}

async function start() {
  at("gateway").value = new URLSearchParams(location.search).get("gateway") ?? location.origin;
  const progress = (done, total) => {
    at("progress").hidden = false;
    at("progress").value = done / total;
    status(`Loading the encoder: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  };
  state.encoder = await openEncoder({ progress, starting: () => status("Starting the encoder …") });
  at("progress").hidden = true;
  at("files").disabled = false;
  at("files").onchange = () => { [...at("files").files].forEach(add); at("files").value = ""; };
  status("Ready.");
}

start().catch(error => status(error.message, true));
