// One question at a time. All that comes from the study is set as text or as an image's address,
// never as markup. Where one is comes from the server, so a reload goes on where it was.

const at = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "both", ArrowDown: "neither", s: "skip" };

let participant = sessionStorage.getItem("participant");
let question = null;
let since = 0; // when it was shown
let busy = false;

function complain(text) {
  at("wrong").textContent = text;
  at("wrong").hidden = !text;
}

async function ask(path, body) {
  const options = body && {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options || {});
  } catch {
    throw new Error("The study does not answer. Your answers so far are kept; try again.");
  }
  if (answer.status === 401) {
    const token = prompt("This study asks for a token");
    if (!token) throw new Error("The study asks for a token.");
    await fetch("/v1/session", { method: "POST", headers: { authorization: `Bearer ${token}` } });
    return ask(path, body);
  }
  if (answer.status === 404 && !body) { // a study begun anew, or one of another name
    sessionStorage.removeItem("participant");
    participant = null;
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    const detail = typeof told.detail === "string" ? told.detail : `status ${answer.status}`;
    throw new Error(`That did not work: ${detail}. Try again.`);
  }
  return answer.json();
}

function picture(address) {
  const image = document.createElement("img");
  image.alt = "a result";
  image.src = `${address}?side=256`;
  image.onerror = () => { image.alt = "this picture cannot be shown"; };
  return image;
}

function show(told) {
  participant = told.participant;
  sessionStorage.setItem("participant", participant);
  question = told.question;
  at("begin").hidden = true;
  at("question").hidden = !question;
  at("end").hidden = Boolean(question);
  at("back").hidden = told.done === 0;
  at("progress").textContent = `${told.done} of ${told.total} answered`;
  at("bar").value = told.done;
  at("bar").max = Math.max(told.total, 1);
  if (!question) return;
  at("text").textContent = question.text || "the same";
  at("reference").src = `${question.reference}?side=256`;
  at("left").replaceChildren(...question.left.map(picture));
  at("right").replaceChildren(...question.right.map(picture));
  since = performance.now();
}

async function turn(path, body) {
  if (busy) return; // a double click is one answer
  busy = true;
  try {
    show(await ask(path, body));
    complain("");
  } catch (error) {
    complain(error.message);
  } finally {
    busy = false;
  }
}

function choose(choice) {
  if (!question) return;
  const seconds = (performance.now() - since) / 1000;
  turn("/v1/judge", { participant, question: question.id, choice, seconds });
}

function undo() {
  if (participant && !at("back").hidden) turn("/v1/undo", { participant });
}

at("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  turn("/v1/begin", { name: at("name").value });
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
at("undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if (!at("begin").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key.toLowerCase() === "u") undo();
  const choice = KEYS[event.key] || KEYS[event.key.toLowerCase()];
  if (choice) {
    event.preventDefault();
    choose(choice);
  }
});
if (participant) turn(`/v1/next?participant=${encodeURIComponent(participant)}`);
