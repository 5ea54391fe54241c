"use strict";
// Draws the charts from the page's own data.  Everything else on the page is readable without this script.
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const folds = [...document.querySelectorAll("details.fold")];
  const charts = [...document.querySelectorAll(".chart")].filter((box) => data.figures[box.id]);
  const drawn = new Set();
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]], plotlyServerURL: "", showTips: false };
  const system = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;

  root.classList.add("js");
  // Folds are open in the source for readers without JavaScript.
  folds.forEach((fold) => { if (!("keep" in fold.dataset)) fold.open = false; });

  const isDark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  // The same figure with each colour of the light palette swapped for its dark twin.
  const themed = (value) => {
    if (typeof value === "string") return isDark() && Object.hasOwn(data.dark, value) ? data.dark[value] : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };

  const draw = (box) => {
    if (!window.Plotly) return;
    const figure = themed(data.figures[box.id]);
    figure.data.forEach((trace) => { if (typeof trace.hovertext === "number") trace.hovertext = data.texts[trace.hovertext]; });
    figure.layout = { ...themed(data.layout), ...figure.layout };
    if (printing) figure.layout = { ...figure.layout, width: 660, height: box.matches(".tall *, .high") ? 320 : 210 };
    else figure.layout = { ...figure.layout, autosize: true };
    Plotly.react(box, figure.data, figure.layout, config);
    drawn.add(box);
    box.dataset.drawn = "yes";
  };
  const drawAll = () => charts.forEach(draw);
  const redraw = () => drawn.forEach(draw);

  const button = document.getElementById("theme");
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  label();
  button.setAttribute("aria-label", "Switch between light and dark");
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); redraw(); });
  system.addEventListener("change", () => { label(); redraw(); });

  let opened = [];
  addEventListener("beforeprint", () => {
    if (printing) return;
    printing = true;
    opened = folds.filter((fold) => !fold.open);
    folds.forEach((fold) => { fold.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    opened.forEach((fold) => { fold.open = false; });
    redraw();
  });

  const start = () => {
    charts.slice(0, data.eager).forEach(draw);
    const rest = charts.slice(data.eager);
    const watcher = new IntersectionObserver((seen) => seen.forEach((entry) => {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
      if (entry.isIntersecting) watcher.unobserve(entry.target);
    }), { rootMargin: "300px" });
    rest.forEach((box) => watcher.observe(box));
    // And when the reader pauses, so that a jump to a chart finds it drawn.
    const next = () => {
      const box = rest.find((one) => !drawn.has(one));
      if (box) { draw(box); (window.requestIdleCallback || setTimeout)(next); }
    };
    (window.requestIdleCallback || setTimeout)(next);
  };

  const fail = () => {
    const notice = document.getElementById("no-charts");
    notice.textContent = "This browser could not unpack the charts. The tables hold the same figures.";
    notice.hidden = false;
    charts.forEach((box) => { box.hidden = true; });
    document.querySelectorAll("figure details").forEach((fold) => { fold.open = true; });
  };

  // Plotly is carried compressed.  Its text, made a script element, must match the hash in the page's policy.
  const unpack = async () => {
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    packed.replaceWith(script);
    if (!window.Plotly) throw new Error("plotly did not start");
    start();
  };
  if (charts.length) addEventListener("DOMContentLoaded", () => { unpack().catch(fail); });
})();
