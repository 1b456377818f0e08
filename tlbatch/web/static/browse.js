"use strict";

/* Keys, labels and a form without empty fields. What the pages show comes from the server. */

const names = [...document.getElementById("keys").content.children].map((one) => one.textContent);
const help = document.getElementById("help");
const done = []; // what was labelled here, to take it back

function say(text) {
  document.getElementById("said").textContent = text;
}

function holder(address) {
  return [...document.querySelectorAll("[data-address]")].find((one) => one.dataset.address === address);
}

/** Give an image a label, or take it back with an empty one; resolves to the label that it had from here before. */
async function label(address, name) {
  const body = new URLSearchParams({ address, label: name });
  const answer = await fetch("/label", { method: "POST", body }).catch(() => null);
  if (answer === null || !answer.ok) {
    const page = answer && new DOMParser().parseFromString(await answer.text(), "text/html");
    say(page?.querySelector(".nothing")?.textContent ?? "It was not saved: tlbatch does not answer.");
    return null;
  }
  const shown = holder(address)?.querySelector(".truth");
  if (shown) {
    shown.outerHTML = await answer.text();
  }
  say(name ? `Saved: ${name}` : "Taken back");
  return new URLSearchParams(answer.headers.get("X-Before")).get("label");
}

async function labelled(address, name) {
  const before = await label(address, name);
  if (before !== null) {
    done.push([address, before]);
  }
  return before !== null;
}

async function undo() {
  const last = done.pop();
  if (last === undefined) {
    say("Nothing to take back.");
  } else if ((await label(...last)) === null) {
    done.push(last);
  } else {
    holder(last[0])?.focus();
  }
}

function tiles() {
  return [...document.querySelectorAll("a.tile")];
}

/** How many tiles stand in a row. */
function across(all) {
  const first = all[0].offsetTop;
  const next = all.findIndex((one) => one.offsetTop !== first);
  return next < 0 ? all.length : next;
}

function move(key) {
  const all = tiles();
  if (!all.length) {
    return;
  }
  const at = all.indexOf(document.activeElement);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across(all), ArrowDown: across(all) }[key];
  const to = at < 0 ? 0 : Math.min(Math.max(at + step, 0), all.length - 1);
  all[to].focus();
}

async function pressed(event) {
  const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
  if (typing || help.open || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const one = document.querySelector(".one");
  if (event.key.startsWith("Arrow")) {
    const link = document.getElementById({ ArrowLeft: "before", ArrowRight: "behind" }[event.key] ?? "none");
    if (one && !link) {
      return; // the page scrolls
    }
    event.preventDefault();
    if (link) {
      link.click();
    } else {
      move(event.key);
    }
  } else if (event.key === "Escape") {
    document.getElementById("back")?.click();
  } else if (event.key === "u") {
    undo();
  } else if (event.key === "?") {
    help.showModal();
  } else if (event.key === "/") {
    event.preventDefault();
    document.getElementById("folder")?.focus();
  } else if (names[event.key - 1] !== undefined) {
    const target = one ?? document.activeElement.closest("a.tile");
    if (!target) {
      say("Choose an image first, with the arrow keys.");
    } else if ((await labelled(target.dataset.address, names[event.key - 1])) && !one) {
      move("ArrowRight");
    }
  }
}

document.addEventListener("keydown", pressed);
document.getElementById("help-button").addEventListener("click", () => help.showModal());

const filter = document.getElementById("filter");
if (filter) {
  filter.addEventListener("change", () => filter.requestSubmit());
  filter.addEventListener("submit", () => {
    const usual = { low: "0", high: "1", order: "unsure" };
    for (const field of filter.elements) {
      field.disabled = field.name !== "" && (field.value === "" || field.value === usual[field.name]);
    }
  });
  // A page that comes back from the browser's own memory has the fields as they were left.
  window.addEventListener("pageshow", () => [...filter.elements].forEach((field) => (field.disabled = false)));
}

const answer = document.getElementById("label");
if (answer) {
  const address = answer.elements.address.value;
  answer.addEventListener("submit", (event) => {
    event.preventDefault();
    labelled(address, answer.elements.label.value.trim());
  });
  for (const button of answer.querySelectorAll("[data-label]")) {
    button.addEventListener("click", () => labelled(address, button.dataset.label));
  }
}
