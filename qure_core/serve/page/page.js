// The page: one question at a time, its answers as a grid, and the steps that led there.
// All that comes from the corpus is set as text, never as markup.

const at = (id) => document.getElementById(id);
const PAGE = 40; // answers that are loaded at a time
const MOST = 1000; // that the service gives

let index = { categories: [], metadata: {}, images: 0 };
let steps = []; // {image: null | {id} | {file, url}, text, category, where}
let step = -1; // the one that is shown
let shown = 0; // answers in the grid
let ended = false;
let asking = null; // the request under way

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text) { at("said").textContent = text; }

function complain(text) {
  at("wrong").textContent = text;
  at("wrong").hidden = !text;
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    await welcome();
    return ask(path, options);
  }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer.json();
}

async function reason(answer) {
  let detail = "";
  try {
    const found = (await answer.json()).detail;
    detail = typeof found === "string" ? found : found.map((one) => one.msg).join("; ");
  } catch { /* no JSON: the status says what there is to say */ }
  return detail ? detail[0].toUpperCase() + detail.slice(1) + "." : `The service answered ${answer.status}.`;
}

let welcoming = null;
function welcome() { // asks for the token, once for all that wait for it
  welcoming ??= new Promise((done) => {
    const dialog = at("token");
    dialog.onclose = async () => {
      const headers = { authorization: `Bearer ${at("secret").value}` };
      const answer = await fetch("/v1/session", { method: "POST", headers });
      at("secret").value = "";
      if (answer.ok) {
        welcoming = null;
        done();
      } else {
        complain("That is not the token.");
        dialog.showModal();
      }
    };
    dialog.showModal();
  });
  return welcoming;
}

// Pictures.

function picture(src, name) {
  const frame = element("span", { className: "frame" });
  const image = element("img", { src, alt: name, loading: "lazy" });
  image.onerror = () => {
    frame.replaceChildren(element("span", { className: "missing", textContent: `no picture: ${name}` }));
  };
  frame.append(image);
  return frame;
}

async function lookAt(frame, result) {
  const image = frame.querySelector("img");
  if (!image || frame.dataset.looked) return;
  frame.dataset.looked = "1";
  let found;
  try {
    found = await ask(`/v1/attention/${encode(result.id)}?token=${result.token}`);
  } catch (error) {
    say(error.message);
    return;
  }
  try {
    await image.decode(); // its place is known from here on
  } catch {
    return; // there is no picture to lay it over
  }
  const side = found.grid.length;
  const canvas = element("canvas", { width: side, height: side });
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(side, side);
  found.grid.flat().forEach((value, i) => {
    pixels.data.set([16, 24, 64, Math.round(215 * (1 - value))], 4 * i); // dark where it did not look
  });
  pen.putImageData(pixels, 0, 0);
  const [left, top, width, height] = found.box;
  const seen = element("span", { className: "seen" }, canvas); // as large as the picture, which cuts it off
  const place = (made, x, y, w, h) => Object.assign(made.style, { left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px` });
  const [w, h] = [image.offsetWidth, image.offsetHeight];
  place(seen, image.offsetLeft, image.offsetTop, w, h);
  place(canvas, left * w, top * h, width * w, height * h);
  frame.append(seen);
}

addEventListener("resize", () => {
  for (const seen of document.querySelectorAll(".seen")) {
    delete seen.parentElement.dataset.looked;
    seen.remove();
  }
});

function encode(id) { return id.split("/").map(encodeURIComponent).join("/"); }

// Questions.

function current() { return steps[step] ?? { image: null, text: "", category: "", where: {} }; }

function choices() {
  const where = {};
  for (const select of at("filters").querySelectorAll("select[data-column]")) {
    if (select.value) where[select.dataset.column] = select.value;
  }
  return { category: at("category")?.value ?? "", where };
}

function begin(question) {
  steps = [...steps.slice(0, step + 1), question];
  step = steps.length - 1;
  history.pushState({ step }, "");
  show();
}

function go(number) {
  step = number;
  show();
}

function show() {
  const question = current();
  at("text").value = question.text;
  if (at("category")) at("category").value = question.category;
  for (const select of at("filters").querySelectorAll("select[data-column]")) {
    select.value = question.where[select.dataset.column] ?? "";
  }
  showReference(question.image);
  showTrail();
  restart();
}

function showReference(image) {
  const help = element("span", { id: "drop-help", textContent: "Drop, paste or choose a picture" });
  const box = at("reference");
  const file = at("file");
  if (!image) box.replaceChildren(help, file);
  else {
    const name = image.id ?? image.file.name ?? "your picture";
    const made = element("img", { src: source(image), alt: `Reference: ${name}` });
    made.onerror = () => made.replaceWith(`no picture: ${name}`);
    box.replaceChildren(made, file);
  }
}

function source(image) { return image.id === undefined ? image.url : `/v1/images/${encode(image.id)}`; }

function showTrail() {
  const made = steps.map((question, number) => {
    const button = element("button", { type: "button" });
    if (question.image) {
      const small = element("img", { src: source(question.image), alt: "" });
      small.onerror = () => small.remove();
      button.append(small);
    }
    button.append(question.text || (question.image ? "like this" : "start"));
    if (number === step) button.setAttribute("aria-current", "step");
    button.onclick = () => history.go(number - step);
    return button;
  });
  at("trail").replaceChildren(...(steps.length > 1 ? made : []));
}

function restart() {
  asking?.abort();
  asking = null;
  shown = 0;
  ended = false;
  complain("");
  at("results").replaceChildren();
  at("about").hidden = true;
  const question = current();
  if (question.image || question.text) more();
  else browse();
}

async function browse() {
  ended = true;
  const mine = (asking = new AbortController());
  const category = choices().category;
  const wanted = new URLSearchParams({ count: 36, seed: Math.floor(Math.random() * 1e9) });
  if (category) wanted.set("category", category);
  try {
    const found = await ask(`/v1/images?${wanted}`, { signal: mine.signal });
    if (asking !== mine) return;
    at("results").replaceChildren(...found.map((one) => card(one, "")));
    say(`Some of ${index.images.toLocaleString()} pictures: choose one to begin from, or type what you look for.`);
  } catch (error) {
    if (asking !== mine) return;
    complain(error.message);
    say("");
  } finally {
    if (asking === mine) asking = null;
  }
}

async function more() {
  if (asking || ended) return;
  const mine = (asking = new AbortController());
  const question = current();
  const body = new FormData();
  if (question.image?.id !== undefined) body.set("image_id", question.image.id);
  else if (question.image) body.set("image", question.image.file, "image");
  body.set("text", question.text);
  if (question.category) body.set("category", question.category);
  for (const [column, value] of Object.entries(question.where)) body.append("where", `${column}=${value}`);
  body.set("offset", shown);
  body.set("top", Math.min(PAGE, MOST - shown));
  body.set("explain", at("why").checked);
  if (!shown) say("Searching …");
  try {
    const found = await ask("/v1/search", { method: "POST", body, signal: mine.signal });
    if (asking !== mine) return;
    add(found);
  } catch (error) {
    if (asking !== mine) return;
    ended = true;
    complain(error.message);
    if (!shown) say("");
  } finally {
    if (asking === mine) asking = null;
  }
  if (!ended && at("more").getBoundingClientRect().top < innerHeight + 400) more();
}

function add(found) {
  const cards = [];
  for (const result of found.results) {
    cards.push(card(result, `${result.rank}. ${result.id}`));
    if (result.rank === found.likely) {
      cards.push(element("div", { className: "ends", textContent: "likely matches above" }));
    }
  }
  at("results").append(...cards);
  shown += found.results.length;
  ended = found.results.length < PAGE || shown >= MOST;
  at("about").hidden = !at("why").checked;
  const took = Math.round(found.times_ms.total);
  say(shown ? `${shown.toLocaleString()} of ${found.images.toLocaleString()} pictures, the best first; ${took} ms.` : "Nothing is left to be found.");
}

function card(result, facts) {
  const frame = picture(result.image, result.id);
  const button = element("button", { type: "button", className: "hit", title: result.id }, frame);
  if (facts) button.append(element("span", { className: "facts", textContent: facts }));
  if (result.score !== undefined) button.append(element("span", { className: "facts", textContent: result.score.toFixed(4) }));
  button.onclick = () => begin({ image: { id: result.id }, text: "", ...choices() });
  if (result.token !== undefined && result.token !== null) {
    button.onmouseenter = button.onfocus = () => lookAt(frame, result);
  }
  return button;
}

// What people do.

function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    complain(`${file.name || "That"} is no picture.`);
    return;
  }
  begin({ image: { file, url: URL.createObjectURL(file) }, text: at("text").value.trim(), ...choices() });
  at("text").focus();
}

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  const { image } = current();
  if (!image && !text) {
    complain("Choose a picture, or type what you look for.");
    return;
  }
  begin({ image, text, ...choices() });
};
at("clear").onclick = () => {
  begin({ image: null, text: "", category: "", where: {} });
  at("text").focus();
};
at("why").onchange = restart;
at("reference").onclick = () => at("file").click();
at("reference").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    at("file").click();
  }
};
at("file").onclick = (event) => event.stopPropagation();
at("file").onchange = () => {
  take(at("file").files[0]);
  at("file").value = "";
};
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    take(file);
  }
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  at("reference").classList.add("over");
});
addEventListener("dragleave", () => at("reference").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("reference").classList.remove("over");
  take(event.dataTransfer?.files[0]);
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) {
    event.preventDefault();
    at("text").focus();
  }
});
addEventListener("popstate", (event) => go(Math.min(event.state?.step ?? 0, steps.length - 1)));
new IntersectionObserver((seen) => {
  if (seen[0].isIntersecting && shown) more();
}, { rootMargin: "400px" }).observe(at("more"));

function chooser(label, values, properties) {
  const select = element("select", properties);
  select.append(element("option", { value: "", textContent: "any" }));
  for (const value of values) select.append(element("option", { value, textContent: value }));
  select.onchange = () => {
    const question = current();
    begin({ image: question.image, text: at("text").value.trim(), ...choices() });
  };
  return element("label", {}, `${label} `, select);
}

async function start() {
  try {
    index = await ask("/v1/index");
  } catch (error) {
    complain(error.message);
    return;
  }
  const filters = [];
  if (index.categories.length > 1) filters.push(chooser("Category", index.categories, { id: "category" }));
  for (const [column, values] of Object.entries(index.metadata)) {
    const made = chooser(column, values, {});
    made.querySelector("select").dataset.column = column;
    filters.push(made);
  }
  at("filters").replaceChildren(...filters);
  steps = [{ image: null, text: "", category: "", where: {} }];
  step = 0;
  history.replaceState({ step }, "");
  show();
}

start();
