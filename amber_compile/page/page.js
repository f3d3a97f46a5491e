"use strict";
/* The page's behaviour. All text goes in as text; drawings are parsed as SVG, never as HTML. */
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const radios = (name) => [...document.querySelectorAll(`input[name="${name}"]`)];
  const make = (tag, text, ...classes) => {
    const made = document.createElement(tag);
    made.textContent = text;
    made.classList.add(...classes);
    return made;
  };
  document.documentElement.classList.add("scripted");

  /* ---- heat map ---- */

  const heat = find("heat");
  const cells = heat ? [...heat.querySelectorAll("button")] : [];
  const meanings = {
    coverage: "Part of a projection’s outputs that reads a sparse activation.",
    removed: "Part of a projection’s multiply-accumulates that meet a dropped zero.",
    error: `Relative error of a projection’s output on the first call; the darkest is ${heat ? heat.dataset.worst : ""}.`,
  };
  const paint = (measure) => {
    heat.dataset.measure = measure;
    for (const cell of cells) {
      cell.className = `h${cell.dataset[measure]}`;
      const site = data.sites[cell.dataset.at];
      const sparse = site.pattern === "dense" ? "–" : site.pattern;
      cell.textContent = measure === "error" && site.error !== null ? site.error : sparse;
    }
    find("measure-text").textContent = `${meanings[measure]} Choose a cell to read why.`;
  };
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = (event) => {
    const [down, right] = step[event.key] || [0, 0];
    const cell = event.target.closest("td");
    if (!cell || (!down && !right)) return;
    event.preventDefault();
    let row = cell.parentElement;
    let column = cell.cellIndex;
    for (;;) {
      row = down > 0 ? row.nextElementSibling : down < 0 ? row.previousElementSibling : row;
      column += right;
      if (!row || !row.cells[column] || row.cells[column].tagName !== "TD") return;
      const button = row.cells[column].querySelector("button");
      if (button) return focus(button);
    }
  };
  const focus = (button) => {
    for (const cell of cells) cell.tabIndex = -1;
    button.tabIndex = 0;
    button.focus();
  };
  if (heat) {
    heat.classList.add("ready");
    paint("coverage");
    cells[0].tabIndex = 0;
    heat.addEventListener("keydown", move);
    heat.addEventListener("click", (event) => {
      if (event.target.matches("button")) {
        focus(event.target);
        choose(Number(event.target.dataset.at));
      }
    });
    for (const radio of radios("measure")) radio.addEventListener("change", () => paint(radio.value));
  }

  /* ---- the chosen projection ---- */

  const choose = (at) => {
    const site = data.sites[at];
    for (const cell of cells) cell.setAttribute("aria-pressed", String(Number(cell.dataset.at) === at));
    for (const row of rows) row.classList.toggle("chosen", Number(row.dataset.at) === at);
    chosen = site;
    mark();
    if (find("detail")) describe(site);
  };
  const describe = (site) => {
    const list = document.createElement("dl");
    const add = (name, value) => {
      if (value) list.append(make("dt", name), make("dd", value));
    };
    add(site.pattern === "dense" ? "why" : "how", site.how);
    add("format", site.format);
    add("weight", site.weight);
    add("MACs", site.macs);
    add("kernel", site.kernel);
    add("error", site.error);
    const title = make("h3", `${site.leaf} `);
    title.append(make("span", site.pattern, "tag", site.pattern === "dense" ? "dense" : "sparse"));
    const buttons = document.createElement("div");
    const button = (text, act) => {
      const made = make("button", text, "link");
      made.type = "button";
      made.addEventListener("click", act);
      buttons.append(made);
    };
    const graph = graphOf(site.layer);
    if (graph >= 0) button("Show in its graph", () => { show(graph, site.layer); find("graphs").scrollIntoView(); });
    const source = [...document.querySelectorAll("[data-kernel]")].find((one) => one.dataset.kernel === site.kernel);
    if (site.kernel && source) button("Read its kernel", () => open(source));
    find("detail").replaceChildren(title, make("p", site.layer || "outside of the layers", "path"), list, buttons);
  };
  const open = (heading) => {
    const details = heading.nextElementSibling;
    if (details && details.tagName === "DETAILS") details.open = true;
    heading.scrollIntoView();
  };
  let chosen = null;

  /* ---- table ---- */

  const table = find("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = radios("kind").find((radio) => radio.checked).value;
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = (kind && !row.classList.contains(kind)) || !words.every((word) => texts[at].includes(word));
      shown += !row.hidden;
    });
    const all = `${rows.length} projection${rows.length === 1 ? "" : "s"}`;
    find("count").textContent = shown === rows.length ? all : `${shown} of ${all}`;
  };
  const collator = new Intl.Collator("en", { numeric: true });
  const sort = (heading) => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const column = heading.cellIndex;
    const key = (row) => {
      const cell = row.cells[column];
      return heading.dataset.key === "number" ? Number(cell.dataset.value) : cell.textContent;
    };
    const keyed = [...body.rows].map((row) => [key(row), row]);
    keyed.sort(([a], [b]) => (typeof a === "number" ? a - b : collator.compare(a, b)) * (up ? 1 : -1));
    body.append(...keyed.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  };
  for (const heading of table.tHead.rows[0].cells) {
    const button = make("button", heading.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(heading));
    heading.replaceChildren(button);
  }
  table.classList.add("ready");
  find("filter").addEventListener("input", filter);
  for (const radio of radios("kind")) radio.addEventListener("change", filter);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(Number(row.dataset.at));
  });

  /* ---- graphs ---- */

  const view = find("graph-view");
  const stepsOf = (graph, name) => {
    const steps = data.graphs[graph].views[name];
    return typeof steps === "string" ? [steps, data.graphs[graph].views[steps]] : [name, steps];
  };
  const graphOf = (name) => {
    const own = Number(view ? find("graph").value : -1);
    const has = (graph) => graph && name in graph.views;
    return has(data.graphs[own]) ? own : data.graphs.findIndex(has);
  };
  const option = (value, text) => {
    const made = make("option", text);
    made.value = value;
    return made;
  };
  const show = (graph, name, step = -1) => {
    const order = data.graphs[graph].order;
    find("graph").value = graph;
    find("layer").replaceChildren(...order.map((one) => option(one, one || "outside of the layers")));
    find("layer").value = order.includes(name) ? name : order[0];
    const [drawn, steps] = stepsOf(graph, find("layer").value);
    find("step").replaceChildren(...steps.map((one, at) => option(at, one.names[1])));
    find("step").value = step < 0 ? steps.length - 1 : step;
    find("step-label").hidden = steps.length < 2;
    draw(drawn, steps[find("step").value]);
    find("previous").disabled = order.indexOf(find("layer").value) <= 0;
    find("next").disabled = order.indexOf(find("layer").value) >= order.length - 1;
  };
  const draw = (drawn, step) => {
    const same = step.diff === null;
    find("before-name").textContent = same ? "as it was traced" : `before: ${step.names[0]}`;
    find("after-name").textContent = `after: ${step.names[1]}`;
    find("after").parentElement.hidden = same;
    find("drawings").classList.toggle("single", same);
    insert(find("before"), data.texts[step.drawings[0]]);
    insert(find("after"), data.texts[step.drawings[1]]);
    const layer = find("layer").value;
    const count = `${step.changed} operation${step.changed === 1 ? "" : "s"} new or changed`;
    const twin = drawn === layer ? "" : `, shown for ${drawn}, with which it shares a graph`;
    find("graph-text").textContent = (same ? "No pass changed anything here" : count) + twin + ".";
    write(same ? "" : data.texts[step.diff]);
    form();
    mark();
  };
  const insert = (place, text) => {
    const parsed = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
    place.replaceChildren(parsed.localName === "svg" ? document.importNode(parsed, true) : make("p", text));
  };
  const tags = { "+": "ins", "-": "del" };
  const write = (text) => {
    const lines = text.split("\n").slice(2);
    const made = lines.map((line) => make(tags[line[0]] || "span", line + "\n", ...(line.startsWith("@@") ? ["place"] : [])));
    find("diff").firstElementChild.replaceChildren(...(text ? made : [make("span", "Nothing changed.")]));
  };
  const form = () => {
    const text = radios("form").find((radio) => radio.checked).value === "text";
    find("drawings").hidden = text;
    find("diff").hidden = !text;
    document.querySelector(".legend").hidden = text;
  };
  const mark = () => {
    if (!view) return;
    for (const box of view.querySelectorAll("[data-site]")) {
      const here = chosen && chosen.layer === find("layer").value && chosen.leaf === box.dataset.site;
      box.classList.toggle("chosen", Boolean(here));
    }
  };
  if (view) {
    const first = data.graphs.findIndex((graph) => Object.values(graph.views).some((steps) => steps[0].changed));
    const graph = first < 0 ? data.graphs.findIndex((one) => one.order.length) : first;
    const start = data.graphs[graph];
    const changed = start.order.find((name) => stepsOf(graph, name)[1].some((step) => step.changed));
    show(graph, changed === undefined ? start.order[0] : changed);
    const go = (by) => {
      const at = find("layer").selectedIndex + by;
      show(Number(find("graph").value), data.graphs[find("graph").value].order[at]);
    };
    find("graph").addEventListener("change", () => show(Number(find("graph").value), find("layer").value));
    find("layer").addEventListener("change", () => show(Number(find("graph").value), find("layer").value));
    find("step").addEventListener("change", () => show(Number(find("graph").value), find("layer").value, Number(find("step").value)));
    find("previous").addEventListener("click", () => go(-1));
    find("next").addEventListener("click", () => go(1));
    for (const radio of radios("form")) radio.addEventListener("change", form);
    view.addEventListener("click", (event) => {
      const box = event.target.closest("[data-site]");
      if (!box) return;
      const layer = find("layer").value;
      const at = data.sites.findIndex((site) => site.layer === layer && site.leaf === box.dataset.site);
      if (at >= 0) choose(at);
    });
  }
  performance.mark("amber-ready");
})();
