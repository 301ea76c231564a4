"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  // --- theme ------------------------------------------------------------------------------
  const theme = $("#theme");
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  // --- details of a cell ------------------------------------------------------------------
  const tip = $("#tip");
  let shown = null;
  const position = () => {
    const box = shown.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.right - tip.offsetWidth), innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? box.bottom + 8 : box.top - tip.offsetHeight - 8}px`;
  };
  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  };
  const show = (target) => {
    hide();
    shown = target;
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    target.setAttribute("aria-describedby", "tip");
    position();
  };
  const tipped = (event) => event.target.closest?.("[data-tip]");
  document.addEventListener("mouseover", (event) => { const at = tipped(event); at ? show(at) : hide(); });
  document.addEventListener("focusin", (event) => { const at = tipped(event); at ? show(at) : hide(); });
  document.addEventListener("focusout", hide);
  // Scroll events come late: one that brought the cell into view may arrive after its details.
  document.addEventListener("scroll", () => { if (shown) position(); }, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // --- leaderboard ------------------------------------------------------------------------
  const board = $("#board");
  if (board) {
    $(".tools").hidden = false;
    const bodies = $$("tbody", board);
    const rows = $$("tr[data-row]", board);
    const home = new Map(rows.map((row) => [row, row.parentElement]));
    const sorted = element("tbody");
    let order = null; // {column, direction}
    const lowFirst = new Set(["parameters", "weight_bytes", "latency_ms", "peak_memory_bytes", "thinking", "answer", "training_tokens", "training_hours"]);

    const value = (row, index) => {
      const shown = $$(".v", row.cells[index]).find((node) => node.offsetParent !== null || node.classList.contains(board.dataset.mode));
      const number = Number.parseFloat(shown?.dataset.value ?? "");
      return Number.isNaN(number) ? null : number;
    };
    const arrange = () => {
      $$("thead th[aria-sort]", board).forEach((head) => head.removeAttribute("aria-sort"));
      if (!order) {
        rows.forEach((row) => home.get(row).append(row));
        sorted.remove();
        bodies.forEach((body) => { body.hidden = !wanted(body.dataset.role); });
        return;
      }
      const head = $$("thead tr:last-child th", board)[order.index];
      head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      const decorated = rows.map((row, place) => ({
        row, place, value: order.index ? value(row, order.index) : $("bdi", row).textContent,
      }));
      decorated.sort((a, b) => {
        if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
        const less = typeof a.value === "string" ? a.value.localeCompare(b.value) : a.value - b.value;
        return (order.down ? -less : less) || a.place - b.place;
      });
      sorted.append(...decorated.map((each) => each.row));
      bodies.forEach((body) => { body.hidden = true; });
      board.append(sorted);
    };
    const wanted = (role) => $(`input[name=role][value="${CSS.escape(role)}"]`)?.checked ?? true;

    $$("thead tr:last-child th", board).forEach((head, index) => {
      const text = $(".sortable", head) ?? head;
      const button = element("button", { type: "button", className: "sort", textContent: text.textContent, title: text.title ?? "" });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const downFirst = index > 0 && !lowFirst.has(head.dataset.key);
        if (order?.index !== index) order = { index, down: downFirst };
        else if (order.down === downFirst) order = { index, down: !downFirst };
        else order = null;
        arrange();
      });
    });
    $$("input[name=mode]").forEach((input) => input.addEventListener("change", () => {
      board.dataset.mode = input.value;
      arrange();
    }));
    $$("input[name=role]").forEach((input) => input.addEventListener("change", () => {
      rows.forEach((row) => { row.hidden = !wanted(row.dataset.role); });
      arrange();
    }));

    // One stop in the tab order; arrows walk over the cells.
    const cell = (row, index) => [...(row?.cells[index]?.querySelectorAll(".v[data-tip]") ?? [])].find((node) => node.offsetParent !== null);
    const first = $(".v[data-tip]", board);
    if (first) first.tabIndex = 0;
    board.addEventListener("keydown", (event) => {
      const at = event.target.closest(".v[data-tip]");
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!at || !step) return;
      event.preventDefault();
      const lines = $$("tr[data-row]", board).filter((row) => row.offsetParent !== null);
      let line = lines.indexOf(at.closest("tr")), column = at.closest("td").cellIndex;
      for (;;) {
        line += step[0]; column += step[1];
        if (!lines[line]?.cells[column]) return;
        const next = cell(lines[line], column);
        if (next) { at.tabIndex = -1; next.tabIndex = 0; next.focus(); return; }
      }
    });
  }

  // --- samples ----------------------------------------------------------------------------
  const store = $("#samples-data");
  if (!store) return;
  const data = JSON.parse(store.textContent);
  const picks = { a: $("#pick-a"), b: $("#pick-b"), task: $("#pick-task"), category: $("#pick-category"), kind: $("#pick-kind"), text: $("#pick-text") };
  const option = (text, value) => element("option", { textContent: text, value });
  $("#browser").hidden = false;
  data.models.forEach((model, index) => {
    picks.a.append(option(model.name, index));
    picks.b.append(option(model.name, index));
  });
  picks.task.append(option("all benchmarks", ""));
  data.tasks.forEach((task, index) => picks.task.append(option(task.name, index)));
  picks.a.value = data.pair[0];
  picks.b.value = data.pair[1];
  let place = 0;
  let chosen = [];

  const kinds = {
    changed: (a, b) => a !== b, fixed: (a, b) => b > a, broken: (a, b) => b < a,
    "both-wrong": (a, b) => a === b && a === 0, "both-right": (a, b) => a === b && a > 0, all: () => true,
  };
  const categories = () => {
    const names = [...new Set(data.samples.filter((s) => picks.task.value === "" || s.t === +picks.task.value).map((s) => s.c))].filter(Boolean).sort();
    const held = picks.category.value;
    picks.category.replaceChildren(option("all", ""), ...names.map((name) => option(name, name)));
    picks.category.value = names.includes(held) ? held : "";
    picks.category.disabled = !names.length;
  };
  const select = () => {
    const [a, b] = [+picks.a.value, +picks.b.value];
    const test = kinds[picks.kind.value];
    const words = picks.text.value.trim().toLowerCase();
    const says = (s) => [s.q, s.y, ...s.a].some((text) => text?.toLowerCase().includes(words));
    chosen = data.samples.filter((s) => s.s[a] !== null && s.s[b] !== null && test(s.s[a], s.s[b])
      && (!words || says(s))
      && (picks.task.value === "" || s.t === +picks.task.value)
      && (picks.category.value === "" || s.c === picks.category.value));
    place = 0;
    let fixed = 0, broken = 0, total = 0;
    data.tasks.forEach((task, index) => {
      if (picks.task.value !== "" && index !== +picks.task.value) return;
      fixed += task.better[a]?.[b] ?? 0;
      broken += task.better[b]?.[a] ?? 0;
      total += task.documents;
    });
    const where = picks.task.value === "" ? "the suite" : data.tasks[+picks.task.value].name;
    $("#counts").textContent = `Of ${total.toLocaleString("en")} samples in ${where}, ${data.models[b].name} does better on ${fixed.toLocaleString("en")} and worse on ${broken.toLocaleString("en")}. Stored here and fitting: ${chosen.length}.`;
  };
  const word = (score) => score === null ? ["", "not measured"] : score >= 1 ? ["right", "right"] : score > 0 ? ["partly", `${Math.round(score * 100)} %`] : ["wrong", "wrong"];
  const thumbnail = (sample) => {
    const source = data.images[sample.i];
    const frame = element("div", { className: "image" });
    if (!source) { frame.textContent = "image not stored"; return frame; }
    const image = element("img", { src: source, alt: "The image of the question" });
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 120));
    frame.append(image);
    return frame;
  };
  const draw = () => {
    const card = $("#card");
    const sample = chosen[place];
    $("#previous").disabled = !sample || place === 0;
    $("#next").disabled = !sample || place >= chosen.length - 1;
    $("#place").textContent = sample ? `${place + 1} of ${chosen.length}` : "";
    if (!sample) {
      card.replaceChildren(element("p", { className: "where", textContent: "No stored sample fits this choice." }));
      $("#link").hidden = true;
      return;
    }
    const [a, b] = [+picks.a.value, +picks.b.value];
    const body = element("tbody");
    const others = data.models.map((_, index) => index).filter((index) => index !== a && index !== b);
    [a, ...(a === b ? [] : [b]), ...others].forEach((index) => {
      const [kind, text] = word(sample.s[index]);
      const state = sample.z[index] ? ` (${sample.z[index]})` : "";
      body.append(element("tr", { className: index === a || index === b ? "chosen" : "" },
        element("th", { scope: "row" }, element("bdi", { textContent: data.models[index].name })),
        element("td", { className: "answer", dir: "auto", textContent: sample.a[index] ?? "" }),
        element("td", {}, element("span", { className: `mark ${kind}`, textContent: text + state }))));
    });
    const head = element("thead", {}, element("tr", {}, ...["Model", "Answer", "Score"].map((text) => element("th", { scope: "col", textContent: text }))));
    const where = [data.tasks[sample.t].name, sample.c, sample.d].filter(Boolean).join(" / ");
    card.replaceChildren(thumbnail(sample), element("div", {},
      element("p", { className: "where", textContent: where }),
      element("p", { className: "question", dir: "auto", textContent: sample.q }),
      element("p", { className: "target" }, "Target: ", element("b", { dir: "auto", textContent: sample.y })),
      element("table", {}, element("caption", { className: "hide", textContent: "Answers of every model" }), head, body)));
    const link = $("#link");
    link.hidden = false;
    link.href = address(sample);
  };
  // The address says what is chosen: two models, the filter, the words, the sample.
  const address = (sample) => {
    const [a, b] = [data.models[+picks.a.value].key, data.models[+picks.b.value].key];
    const state = { a, b, kind: picks.kind.value };
    if (picks.task.value !== "") state.task = data.tasks[+picks.task.value].id;
    if (picks.category.value) state.category = picks.category.value;
    if (picks.text.value.trim()) state.text = picks.text.value.trim();
    const start = sample ? `#sample=${encodeURIComponent(data.tasks[sample.t].id)}/${encodeURIComponent(sample.d)}` : "#samples";
    return [start, ...Object.entries(state).map(([key, value]) => `${key}=${encodeURIComponent(value)}`)].join("&");
  };
  const note = () => { try { history.replaceState(null, "", address(chosen[place])); } catch { /* no history here */ } };
  const update = () => { categories(); select(); draw(); };
  const moved = () => { $("#missing").hidden = true; update(); note(); };
  const go = (step) => {
    if (!chosen[place + step]) return;
    place += step;
    draw();
    note();
  };
  const open = () => {
    const [start, ...rest] = location.hash.slice(1).split("&");
    if (start !== "samples" && !start.startsWith("sample=")) return;
    if (start === "samples" && !rest.length) return;
    let named, state;
    try {
      named = start.startsWith("sample=") ? start.slice(7).split("/").map(decodeURIComponent) : null;
      state = Object.fromEntries(rest.map((part) => [part.slice(0, part.indexOf("=")), decodeURIComponent(part.slice(part.indexOf("=") + 1))]));
    } catch { return; }
    const model = (key) => data.models.findIndex((each) => each.key === key);
    if (model(state.a) >= 0) picks.a.value = model(state.a);
    if (model(state.b) >= 0) picks.b.value = model(state.b);
    const task = data.tasks.findIndex((each) => each.id === (state.task ?? (state.kind ? "" : named?.[0])));
    picks.task.value = task < 0 ? "" : task;
    categories();
    picks.category.value = [...picks.category.options].some((each) => each.value === state.category) ? state.category : "";
    picks.kind.value = Object.hasOwn(kinds, state.kind) ? state.kind : "changed";
    picks.text.value = state.text ?? "";
    select();
    const sample = named && data.samples.find((s) => data.tasks[s.t].id === named[0] && s.d === named[1]);
    if (sample && !chosen.includes(sample)) { // the filter has it not: show it all the same
      Object.assign(picks.kind, { value: "all" });
      picks.text.value = picks.category.value = "";
      picks.task.value = sample.t;
      categories();
      select();
    }
    place = Math.max(0, chosen.indexOf(sample));
    const missing = $("#missing");
    missing.hidden = !named || Boolean(sample);
    if (!missing.hidden) missing.textContent = `The sample ${named.join("/")} is not stored on this page, which keeps ${data.samples.length} of all samples; samples.parquet beside the page has every one. Shown instead: the first that fits.`;
    draw();
    $("#samples").scrollIntoView();
  };
  Object.values(picks).forEach((pick) => pick.addEventListener(pick === picks.text ? "input" : "change", moved));
  $("#previous").addEventListener("click", () => go(-1));
  $("#next").addEventListener("click", () => go(1));
  $("#browser").addEventListener("keydown", (event) => {
    if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
    if (event.key === "ArrowLeft") { go(-1); event.preventDefault(); }
    if (event.key === "ArrowRight") { go(1); event.preventDefault(); }
  });
  addEventListener("hashchange", open);
  update();
  open();
})();
