"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const items = data.items;
  const find = (id) => document.getElementById(id);
  // ratings: place of an item -> {grade, at}; done: what undo takes back, last first
  let state = { place: 0, who: "", ratings: {}, done: [] };
  let stored = true;
  let writing = 0;
  let saved = 0;

  const answered = (request) =>
    new Promise((done, failed) => {
      request.onsuccess = () => done(request.result);
      request.onerror = () => failed(request.error);
    });

  // Not localStorage: Chromium may show a page that is opened again an empty one, and what is then kept replaces the rest.
  const database = new Promise((done, failed) => {
    const request = indexedDB.open("dagr-annotate", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("ratings");
    answered(request).then(done, failed);
  });

  async function load() {
    try {
      const ratings = (await database).transaction("ratings").objectStore("ratings");
      const before = await answered(ratings.get(data.id));
      if (before && before.ratings && Array.isArray(before.done)) {
        state = before;
        state.place = Math.min(Math.max(0, state.place | 0), items.length - 1);
      }
    } catch {
      stored = false;
    }
  }

  async function keep() {
    const before = stored;
    find("page").setAttribute("aria-busy", String(++writing > 0));
    try {
      const change = (await database).transaction("ratings", "readwrite");
      change.objectStore("ratings").put(state, data.id);
      await new Promise((done, failed) => {
        change.oncomplete = done;
        change.onabort = () => failed(change.error);
      });
      stored = true;
    } catch {
      stored = false;
    }
    find("page").setAttribute("aria-busy", String(--writing > 0));
    if (stored !== before) show();
  }

  const rated = () => Object.keys(state.ratings).length;

  // All text of the corpus goes in as text, never as markup.
  function show(note) {
    const item = items[state.place];
    const rating = state.ratings[state.place];
    find("place").textContent = `Item ${state.place + 1} of ${items.length}`;
    find("reason").textContent = item.reason;
    find("query").textContent = item.query;
    find("title").textContent = item.title;
    find("title").hidden = !item.title;
    find("passage").textContent = item.passage;
    for (const button of document.querySelectorAll("[data-grade]")) {
      button.setAttribute("aria-pressed", String(!!rating && rating.grade === Number(button.dataset.grade)));
    }
    find("undo").disabled = state.done.length === 0;
    find("back").disabled = state.place === 0;
    find("skip").disabled = state.place === items.length - 1;
    find("save").disabled = rated() === 0;
    find("bar").max = items.length;
    find("bar").value = rated();
    find("count").textContent = `${rated()} of ${items.length} rated`;
    const all = rated() === items.length ? "All items are rated: save the file. " : "";
    const lost = stored ? "" : "This browser keeps nothing: save before you close the page. ";
    find("note").textContent = lost + all + (note || "");
  }

  function move(place, note) {
    state.place = Math.min(Math.max(0, place), items.length - 1);
    keep();
    show(note);
    scrollTo(0, 0);
  }

  function rate(grade) {
    state.done.push({ place: state.place, before: state.ratings[state.place] || null });
    state.ratings[state.place] = { grade, at: new Date().toISOString() };
    move(state.place + 1);
  }

  function undo() {
    const last = state.done.pop();
    if (!last) return;
    if (last.before) state.ratings[last.place] = last.before;
    else delete state.ratings[last.place];
    move(last.place, "Taken back.");
  }

  function unrated() {
    for (let step = 1; step <= items.length; step++) {
      const place = (state.place + step) % items.length;
      if (!state.ratings[place]) return move(place);
    }
  }

  function save() {
    if (rated() === 0) return;
    if (!state.who.trim()) {
      find("who").focus();
      return show("Write your name or initials first: the file says who rated.");
    }
    const lines = Object.keys(state.ratings)
      .map(Number)
      .sort((a, b) => a - b)
      .map((place) => {
        const { query_id, doc_id } = items[place];
        const { grade, at } = state.ratings[place];
        return JSON.stringify({ query_id, doc_id, grade, who: state.who.trim(), at }) + "\n";
      });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = `ratings-${data.id.slice(0, 8)}-${state.who.trim().replace(/[^\p{L}\p{N}]+/gu, "_")}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    saved = state.done.length;
    show(`Saved ${lines.length} rating${lines.length === 1 ? "" : "s"} as ${link.download}.`);
  }

  const keys = {
    0: () => rate(0),
    1: () => rate(1),
    2: () => rate(2),
    3: () => rate(3),
    ArrowLeft: () => move(state.place - 1),
    ArrowRight: () => move(state.place + 1),
    s: () => move(state.place + 1),
    u: undo,
    n: unrated,
  };

  addEventListener("keydown", (event) => {
    if (find("page").hidden) return; // what was kept is not there yet
    if (event.target instanceof HTMLInputElement) {
      if (event.key === "Enter" || event.key === "Escape") event.target.blur();
      return;
    }
    if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      event.preventDefault();
      return undo();
    }
    // a key that is held down would rate many items at once
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  addEventListener("beforeunload", (event) => {
    if ((writing || !stored) && state.done.length !== saved) event.preventDefault();
  });
  for (const button of document.querySelectorAll("[data-grade]")) {
    button.addEventListener("click", () => rate(Number(button.dataset.grade)));
  }
  find("back").addEventListener("click", keys.ArrowLeft);
  find("skip").addEventListener("click", keys.ArrowRight);
  find("undo").addEventListener("click", undo);
  find("unrated").addEventListener("click", unrated);
  find("save").addEventListener("click", save);
  find("who").addEventListener("input", (event) => {
    state.who = event.target.value;
    keep();
  });

  load().then(() => {
    find("who").value = state.who;
    find("page").hidden = false;
    keep();
    show();
  });
})();
