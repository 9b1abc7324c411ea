"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const nonce = $("page").nonce;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = {};  // figure -> number of its view
  const scale = { log: true };
  let data = null;

  // ---- theme

  function theme() { try { return localStorage.getItem("autowidth-theme") || "system"; } catch (error) { return theme.kept || "system"; } }
  function setTheme(name) {
    theme.kept = name;
    try { localStorage.setItem("autowidth-theme", name); } catch (error) { /* it lasts as long as the page */ }
    showTheme();
    drawAll();
  }
  function showTheme() {
    const name = theme();
    root.dataset.theme = name === "system" ? (dark.matches ? "dark" : "light") : name;
    $("theme").textContent = `Theme: ${name}`;
  }
  $("theme").addEventListener("click", () => setTheme({ system: "dark", dark: "light", light: "system" }[theme()] || "system"));
  dark.addEventListener("change", () => { if (theme() === "system") { showTheme(); drawAll(); } });
  showTheme();

  // ---- what is packed

  async function unpacked(id) {
    const packed = atob($(id).textContent.trim());
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i += 1) bytes[i] = packed.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  function run(script) {
    const element = document.createElement("script");
    element.nonce = nonce;
    element.textContent = script;
    document.head.append(element);
  }

  // ---- drawing

  function coloured(value, style) {  // var(--name) -> what the style says now
    if (typeof value === "string") return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (!value || typeof value !== "object") return value;
    if (Array.isArray(value)) return value.length && typeof value[0] === "number" && typeof value[value.length - 1] !== "string" ? value : value.map((item) => coloured(item, style));
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
  }
  function layoutOf(own, style, narrow, height) {
    const say = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: say("--line"), zerolinecolor: say("--line"), linecolor: say("--line"), tickfont: { size: narrow ? 10 : 11 }, automargin: true };
    const merged = (name) => ({ ...axis, ...(own[name] || {}), title: { font: { size: 12 }, standoff: 8, ...((own[name] || {}).title || {}) } });
    return {
      ...own, height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif", size: 12, color: say("--ink") },
      hoverlabel: { bgcolor: say("--soft"), bordercolor: say("--grey"), font: { color: say("--ink"), size: 12 }, align: "left" },
      margin: { l: narrow ? 34 : 48, r: 12, t: own.showlegend === false ? 12 : 34, b: 40 }, xaxis: merged("xaxis"), yaxis: merged("yaxis"), colorway: [say("--accent")],
    };
  }
  function numbered(layout, traces, style, narrow) {  // names of layers do not fit on a phone: their numbers do
    if (!narrow || layout.yaxis.type !== "category" || !traces.length || !Array.isArray(traces[0].y)) return traces;
    layout.yaxis.tickvals = traces[0].y.filter((_, n, all) => n % Math.ceil(all.length / 24) === 0);
    layout.yaxis.ticktext = layout.yaxis.tickvals.map((name) => `${traces[0].y.indexOf(name) + 1}`);
    layout.yaxis.title = { text: "layer", font: { size: 12 } };
    return traces.map((trace) => (trace.colorbar ? { ...trace, showscale: false } : trace));
  }
  function draw(key) {
    const figure = data.figures[key];
    const place = document.querySelector(`.chart[data-key="${key}"]`);
    if (!figure || !place) return;
    const style = getComputedStyle(root), narrow = place.clientWidth < 560;
    const view = figure.views[chosen[key] || 0];
    const layout = layoutOf(coloured(view.layout, style), style, narrow, figure.height);
    const traces = numbered(layout, coloured(view.data, style), style, narrow);
    shown(place, traces, layout);
  }
  function shown(place, traces, layout) {
    place.style.height = `${layout.height}px`;
    window.Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  }
  function drawAll() {
    if (!data || !window.Plotly) return;
    Object.keys(data.figures).forEach(draw);
    drawWorths();
  }

  document.querySelectorAll("[data-view]").forEach((button) => button.addEventListener("click", () => {
    const key = button.dataset.figure;
    chosen[key] = Number(button.dataset.view);
    document.querySelectorAll(`[data-figure="${key}"]`).forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    if (data && window.Plotly) draw(key);
  }));

  // ---- worths

  const digits = (number) => (number !== 0 && Math.abs(number) < 1e-3 ? number.toExponential(2) : String(Number(number.toPrecision(3))));
  function picked() {
    return data.worths.find((w) => w.group === $("group").value && w.review === Number($("review").value));
  }
  function drawWorths() {
    if (!$("worths") || !data || !window.Plotly) return;
    const found = picked();
    const style = getComputedStyle(root);
    const say = (name) => style.getPropertyValue(name).trim();
    if (!found) {
      $("worth-said").textContent = "This review did not judge the filters of this channel group.";
      $("worth-rows").replaceChildren();
      window.Plotly.purge($("worths"));
      return;
    }
    const log = scale.log && found.worth.some((w) => w > 0);
    const positive = found.worth.filter((w) => w > 0);
    const floor = positive.length ? Math.min(...positive, found.price || Infinity) / 3 : 1;
    const trace = (name, left, colour, symbol) => {
      const at = found.worth.map((_, n) => n).filter((n) => found.left[n] === left);
      return { type: "scatter", mode: "markers", name, x: at.map((n) => n + 1), y: at.map((n) => (log ? Math.max(found.worth[n], floor) : found.worth[n])), customdata: at.map((n) => found.worth[n]), marker: { color: say(colour), size: found.worth.length > 200 ? 4 : 7, symbol }, hovertemplate: "filter of rank %{x}: %{customdata:.3g} nats<extra></extra>" };
    };
    const gone = found.left.filter(Boolean).length;
    const traces = [trace("stayed", false, "--accent", "circle")];
    if (gone) traces.push(trace("left at this review", true, "--left", "x"));
    if (found.interaction > 0) {
      const ranks = found.worth.map((_, n) => n);
      const step = found.total / found.worth.length;
      traces.push({ type: "scatter", mode: "lines", name: "cost of leaving, in this order", x: ranks.map((n) => n + 1), y: ranks.map((n) => Math.max(found.worth[n], 0) + found.interaction * (2 * n * step + 1)), line: { color: say("--violet"), width: 1.5, dash: "dot" }, hovertemplate: "rank %{x}: %{y:.3g} nats with those before it<extra></extra>" });
    }
    if (found.price > 0) traces.push({ type: "scatter", mode: "lines", name: "price of one filter", x: [0.5, found.worth.length + 0.5], y: [found.price, found.price], line: { color: say("--ink"), width: 2, dash: "dash" }, hovertemplate: "price %{y:.3g} nats<extra></extra>" });
    const own = { xaxis: { title: { text: "filters, the weakest first" }, range: [0, found.worth.length + 1] }, yaxis: { title: { text: "worth, nats" }, type: log ? "log" : "linear", tickformat: "~e", exponentformat: "e" }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, showlegend: true };
    shown($("worths"), traces, layoutOf(own, style, $("worths").clientWidth < 560, $("worths").clientWidth < 560 ? 400 : 360));
    const below = found.price > 0 ? found.worth.filter((w) => w < found.price).length : 0;
    const part = found.worth.length < found.total ? ` (${found.worth.length} of ${found.total} shown)` : "";
    const price = found.price > 0 ? ` One filter has to be worth ${digits(found.price)} nats; ${below} are worth less alone.` : found.price === 0 ? " The price is 0: the last to leave cost nothing." : " This review set no price.";
    const together = found.interaction > 0 ? " Its filters stand in for each other: the dotted line is what each costs when the weaker ones have left." : "";
    const least = log && found.worth[0] <= 0 ? " Worths of 0 and below stand at the lower edge." : "";
    $("worth-said").textContent = `${found.group}: ${found.total} filters${part}, worth ${digits(found.worth[0])} to ${digits(found.worth[found.worth.length - 1])} nats; ${gone} left at this review.${price}${together}${least}`;
    $("worth-rows").replaceChildren(...found.worth.map((w, n) => {
      const row = document.createElement("tr"), rank = document.createElement("th");
      rank.scope = "row";
      rank.textContent = n + 1;
      row.append(rank, ...[digits(w), found.left[n] ? "left" : "stayed"].map((words) => Object.assign(document.createElement("td"), { textContent: words })));
      return row;
    }));
  }
  function pick(group, scroll) {
    const select = $("group");
    if (!select || ![...select.options].some((option) => option.value === group)) return;
    select.value = group;
    drawWorths();
    if (scroll) { $("worth").scrollIntoView(); select.focus({ preventScroll: true }); }
  }
  function press(on, off) { $(on).setAttribute("aria-pressed", "true"); $(off).setAttribute("aria-pressed", "false"); }
  if ($("worths")) {
    const select = $("group"), move = (by) => { select.selectedIndex = (select.selectedIndex + by + select.length) % select.length; drawWorths(); };
    $("previous").addEventListener("click", () => move(-1));
    $("next").addEventListener("click", () => move(1));
    select.addEventListener("change", drawWorths);
    $("review").addEventListener("change", drawWorths);
    $("log").addEventListener("click", () => { scale.log = true; press("log", "linear"); drawWorths(); });
    $("linear").addEventListener("click", () => { scale.log = false; press("linear", "log"); drawWorths(); });
    document.querySelectorAll(".pick").forEach((button) => button.addEventListener("click", () => pick(button.dataset.group, true)));
  }

  // ---- small things

  if ($("find")) $("find").addEventListener("input", () => {
    const wanted = $("find").value.trim().toLowerCase(), rows = [...document.querySelectorAll("#why tbody tr")];
    rows.forEach((row) => { row.hidden = !row.dataset.name.toLowerCase().includes(wanted); });
    const left = rows.filter((row) => !row.hidden).length;
    $("found").textContent = wanted ? `${left} of ${rows.length} layers` : "";
  });
  if ($("copy")) $("copy").addEventListener("click", async () => {
    const code = $($("copy").dataset.copies);
    try { await navigator.clipboard.writeText(code.textContent); } catch (error) {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      $("copied").textContent = "Selected: copy it with the keyboard.";
      return;
    }
    $("copied").textContent = "Copied.";
  });
  function offerSettings() {
    if (!$("download") || !data.settings || !Object.keys(data.settings).length) return;
    $("download").href = URL.createObjectURL(new Blob([JSON.stringify(data.settings, null, 1)], { type: "application/json" }));
    $("download").hidden = false;
  }

  const rest = () => new Promise((done) => setTimeout(done));  // the browser shows what there is
  async function start() {
    if (!("DecompressionStream" in window)) throw new Error("this browser cannot unpack them");
    const [script, content] = await Promise.all([unpacked("plotly"), unpacked("data")]);
    data = JSON.parse(content);
    offerSettings();
    run(script);
    for (const place of document.querySelectorAll(".chart")) {  // what is in view first, and the rest when that is shown
      if (!root.dataset.ready && place.getBoundingClientRect().top > innerHeight) { root.dataset.ready = String(Math.round(performance.now())); await rest(); }
      if (place.dataset.key === "worths") drawWorths(); else draw(place.dataset.key);
      await rest();
    }
    let width = innerWidth;
    addEventListener("resize", () => { if ((width < 640) !== (innerWidth < 640)) drawAll(); width = innerWidth; });
    root.dataset.ready ||= String(Math.round(performance.now()));
    root.dataset.complete = String(Math.round(performance.now()));
  }
  start().catch((error) => {
    $("trouble").textContent = `The pictures cannot be drawn: ${error.message}. Take a browser of 2023 or later; all tables and sentences are here without them.`;
    $("trouble").hidden = false;
    root.dataset.complete = "failed";
    console.error(error);
  });
})();
