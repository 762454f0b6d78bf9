"""The page at `/`: a picture in, its caption out, in a browser."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>VLV captions</title>
<style>
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 40rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
label { display: block; margin: .8rem 0; }
img { max-width: 100%; border-radius: .5rem; }
#caption { min-height: 3rem; }
</style>
<h1>Caption a picture</h1>
<label>Picture <input type="file" id="file" accept="image/*"></label>
<label>API key, where the server asks for one <input type="password" id="key" autocomplete="off"></label>
<img id="picture" alt="">
<p id="caption" aria-live="polite"></p>
<script>
const at = id => document.getElementById(id);
at("file").onchange = async () => {
  const file = at("file").files[0];
  if (!file) return;
  at("picture").src = URL.createObjectURL(file);
  at("caption").textContent = "…";
  const form = new FormData();
  form.append("file", file);
  const headers = at("key").value ? { Authorization: "Bearer " + at("key").value } : {};
  try {
    const answer = await (await fetch("v1/captions", { method: "POST", body: form, headers })).json();
    const result = answer.error ? answer : answer.captions[0];
    at("caption").textContent = result.error ? result.error.message : result.caption;
  } catch (error) {
    at("caption").textContent = "The server does not answer.";
  }
};
</script>
</html>
"""
