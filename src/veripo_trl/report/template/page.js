"use strict";
// What models wrote reaches the page as text nodes only: no markup is ever parsed out of data.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);

function make(tag, name, ...content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...content.filter(item => item !== null && item !== undefined));
  return element;
}

function button(name, text, onClick) {
  const element = make("button", name, text);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

function fill(select, choices) {
  for (const [value, label] of choices) {
    const option = make("option", "", label);
    option.value = value;
    select.append(option);
  }
  select.hidden = choices.length < 2;
}

const number = value => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const wrong = rollout => rollout.accuracy !== null && rollout.accuracy < 0.5;
const isCut = rollout => rollout.finish_reason === "length";
const verdict = rollout => (rollout.verdict ? rollout.verdict.consistency : null);

// ---- completions ----------------------------------------------------------------------------------------------------

const TAG = /^<\/?(?:think|answer)>$/;

// Texts in a row as a paragraph that shows its tags, thinking and answer; those that are marked in elements `tag`.
function paragraph(list, marks, tag) {
  const body = make("p", "text");
  body.dir = "auto";
  let inside = "";
  for (let from = 0, to; from < list.length; from = to) {
    const isTag = TAG.test(list[from]);
    if (isTag) inside = list[from][1] === "/" ? "" : list[from].slice(1, -1);
    to = from + 1;
    while (!isTag && to < list.length && marks[to] === marks[from] && !TAG.test(list[to])) to++;
    const span = make("span", isTag ? "tag" : inside, list.slice(from, to).join(""));
    body.append(marks[from] ? make(tag, "", span) : span);
  }
  return body;
}

const completion = text => paragraph(text.split(/(<\/?(?:think|answer)>)/).filter(Boolean), []);
const badge = (tone, text) => make("span", `badge ${tone}`, text);

function verdictBadges(found) {
  if (!found) return [];
  const tones = {consistent: "good", inconsistent: "bad", unknown: "warn"};
  const badges = [];
  if (found.consistency) badges.push(badge(tones[found.consistency] || "", found.consistency));
  if (found.repetition > 0) badges.push(badge(found.repetition > 0.4 ? "bad" : "", `repetition ${Math.round(100 * found.repetition)}%`));
  if (found.think_tokens !== undefined) badges.push(badge("", `thinking ${number(found.think_tokens)} tokens`));
  return badges;
}

function verdictReason(found) {
  if (!found) return null;
  const concluded = found.concluded_answer === undefined ? "" : `the thinking concludes: ${found.concluded_answer}`;
  return make("p", "reason", [concluded, found.reason, `judge: ${found.judge}`].filter(Boolean).join(" · "));
}

const accuracyTone = value => (value >= 0.999 ? "good" : value < 0.5 ? "bad" : "warn");

// A policy often says the same again: equal completions of a stage are shown once, with their number.
function folded(rollouts) {
  const groups = new Map();
  for (const rollout of rollouts) {
    const key = `${rollout.stage}\n${rollout.completion}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(rollout);
  }
  return [...groups.values()];
}

function rolloutView([rollout, ...others]) {
  const badges = others.length ? [badge("", `× ${number(others.length + 1)}`)] : [];
  if (rollout.accuracy !== null) badges.push(badge(accuracyTone(rollout.accuracy), `accuracy ${rollout.accuracy}`));
  for (const [name, value] of Object.entries(rollout.rewards)) {
    if (!name.startsWith("accuracy") || value !== rollout.accuracy) badges.push(badge("", `${name} ${value}`));
  }
  badges.push(...verdictBadges(rollout.verdict));
  if (isCut(rollout)) badges.push(badge("warn", "cut at the longest length"));
  badges.push(badge("", plural(rollout.completion_tokens, "token")));
  if (rollout.advantage !== null) badges.push(badge("", `advantage ${rollout.advantage.toFixed(2)}`));
  const place = `${data.stages[rollout.stage]}, step ${rollout.step}`;
  const view = make("article", "rollout", make("div", "badges", ...badges, make("span", "", place)), completion(rollout.completion), verdictReason(rollout.verdict));
  view.title = [rollout, ...others].map(item => item.rollout_id).join(", ");
  return view;
}

// ---- questions ------------------------------------------------------------------------------------------------------

function options(item) {
  const list = make("ul", "options", ...item.options.map(option => make("li", "", option)));
  return [item.options.length ? list : null, make("div", "solution", `Solution: ${item.solution}`)];
}

const media = new Map(Object.entries(data.media)); // a file may be called "constructor"

function film(name) {
  const found = media.get(name);
  if (!found) return make("p", "film", `${name}: drawn without its frames`);
  const strip = make("div", "strip");
  strip.tabIndex = 0;
  found.frames.forEach((source, place) => {
    const image = make("img");
    image.alt = found.times.length ? `frame at ${found.times[place]} s` : name;
    image.src = source;
    strip.append(make("figure", "", image, found.times.length ? make("figcaption", "", `${found.times[place]} s`) : null));
  });
  const note = make("p", "film", found.frames.length ? `${name}: ${found.note}` : `${name}: not shown, ${found.note}`);
  return make("div", "", found.frames.length ? strip : null, note);
}

function questionView({question, rollouts}) {
  const files = [...question.videos, ...question.images];
  const shown = 4, groups = folded(rollouts);
  const list = make("div", "rollouts", ...groups.slice(0, shown).map(rolloutView));
  const of = question.total > question.rollouts.length ? ` (${number(question.total)} in the run)` : "";
  const matched = `${number(rollouts.length)} of ${plural(question.rollouts.length, "rollout")}${of}`;
  const card = make("article", "question",
    make("div", "meta", make("span", "", question.question_id), badge("", question.problem_type), badge("", question.data_source), make("span", "", matched)),
    make("p", "problem", question.problem), ...options(question), ...files.map(film), list);
  if (groups.length > shown) {
    card.append(make("details", "", make("summary", "", `${number(groups.length - shown)} more`), ...groups.slice(shown).map(rolloutView)));
  }
  return card;
}

const lower = item => [item.question_id, item.problem, ...item.options, item.data_source, item.solution].join("\n").toLowerCase();
const lowerText = rollout => `${rollout.rollout_id}\n${rollout.completion}`.toLowerCase();

const shows = { // what the first filter offers, by its label
  "All rollouts": () => true,
  "Wrong (accuracy under 0.5)": wrong,
  Inconsistent: rollout => verdict(rollout) === "inconsistent",
  "Right but inconsistent": rollout => verdict(rollout) === "inconsistent" && !wrong(rollout),
  "Consistency unknown": rollout => verdict(rollout) === "unknown",
  "Cut at the longest length": isCut,
};

function chosenQuestions() {
  const text = at("q-text").value.trim().toLowerCase();
  const show = shows[at("q-show").value], kind = at("q-kind").value, stage = at("q-stage").value, sort = at("q-sort").value;
  const found = [];
  for (const question of data.questions) {
    if (kind && question.problem_type !== kind) continue;
    const inQuestion = !text || lower(question).includes(text);
    const rollouts = question.rollouts.filter(rollout =>
      show(rollout) && (stage === "" || rollout.stage === Number(stage)) && (inQuestion || lowerText(rollout).includes(text)));
    if (rollouts.length) found.push({question, rollouts});
  }
  const mean = rollouts => { // of the known accuracies; where there is none, more than any, so that it comes last
    const known = rollouts.filter(rollout => rollout.accuracy !== null);
    return known.length ? known.reduce((sum, rollout) => sum + rollout.accuracy, 0) / known.length : 2;
  };
  if (sort === "longest") {
    for (const item of found) item.rollouts.sort((a, b) => b.completion_tokens - a.completion_tokens);
    found.sort((a, b) => b.rollouts[0].completion_tokens - a.rollouts[0].completion_tokens);
  } else if (sort === "hardest") {
    found.sort((a, b) => mean(a.question.rollouts) - mean(b.question.rollouts));
  } else if (sort === "mixed") {
    found.sort((a, b) => Math.abs(mean(a.question.rollouts) - 0.5) - Math.abs(mean(b.question.rollouts) - 0.5));
  }
  return found;
}

// ---- pairs ----------------------------------------------------------------------------------------------------------

const words = text => text.match(/<\/?(?:think|answer)>|[^\s<]+|<|\s+/g) || [];

// For each word, whether the other side lacks it.
const lacking = (list, other) => { const known = new Set(other); return list.map(word => !known.has(word)); };

function side(name, title, list, marks, tag, verdicts, ids, fault) {
  const found = verdicts.filter(Boolean);
  const badges = fault ? [badge("bad", `rejected as ${fault}`)] : [];
  badges.push(...found.flatMap(item => [
    item.accuracy === undefined ? null : badge(accuracyTone(item.accuracy), `accuracy ${item.accuracy}`), ...verdictBadges(item)]));
  const view = make("section", `side ${name}`, make("h4", "", title), make("div", "badges", ...badges), paragraph(list, marks, tag),
    ...found.map(verdictReason));
  view.title = ids.join(" + ");
  return view;
}

function pairView(pair) {
  const left = words(pair.chosen), right = words(pair.rejected);
  const meta = make("div", "meta", make("span", "", pair.question_id), badge("", pair.kind), make("span", "", data.stages[pair.stage]));
  if (data.questions.some(question => question.question_id === pair.question_id)) {
    meta.append(button("link", "its rollouts", () => {
      for (const id of ["q-show", "q-kind", "q-stage", "q-sort"]) at(id).selectedIndex = 0;
      at("q-text").value = pair.question_id;
      lists.questions.update();
      at("questions").scrollIntoView();
    }));
  }
  return make("article", "pair", meta, make("p", "problem", pair.problem), ...options(pair),
    make("div", "sides",
      side("chosen", "Chosen", left, lacking(left, right), "ins", pair.chosen_verdicts, pair.chosen_ids),
      side("rejected", "Rejected", right, lacking(right, left), "del", [pair.rejected_verdict], [pair.rejected_id], pair.fault)));
}

function chosenPairs() {
  const text = at("p-text").value.trim().toLowerCase(), kind = at("p-kind").value;
  return data.pairs.filter(pair => (!kind || pair.kind === kind) &&
    (!text || [pair.question_id, pair.problem, ...pair.options, pair.solution, pair.chosen, pair.rejected].join("\n").toLowerCase().includes(text)));
}

// ---- lists, filters, pages ------------------------------------------------------------------------------------------

function paged(prefix, perPage, choose, view, describe) {
  const list = {page: 0, items: []};
  list.update = () => { list.items = choose(); list.page = 0; list.draw(); };
  list.turn = change => { list.page += change; list.draw(); at(`${prefix}-filters`).scrollIntoView(); };
  list.draw = () => {
    const from = list.page * perPage, to = Math.min(from + perPage, list.items.length);
    at(`${prefix}-count`).textContent = describe(list.items);
    at(`${prefix}-list`).replaceChildren(...list.items.slice(from, to).map(view));
    const back = button("", "Previous", () => list.turn(-1)), next = button("", "Next", () => list.turn(1));
    back.disabled = from === 0;
    next.disabled = to >= list.items.length;
    at(`${prefix}-pager`).replaceChildren(...(list.items.length > perPage ? [back, `${number(from + 1)} to ${number(to)} of ${number(list.items.length)}`, next] : []));
  };
  const form = at(`${prefix}-filters`);
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(list.update, 120); });
  form.addEventListener("submit", event => { event.preventDefault(); list.update(); });
  return list;
}

const kindsOf = (items, key) => [...new Set(items.map(item => item[key]))].sort().map(kind => [kind, kind]);
const rollouts = data.questions.flatMap(question => question.rollouts);
const offered = Object.keys(shows).filter((name, place) => !place || rollouts.some(shows[name]));
const stagesSeen = [...new Set(rollouts.map(rollout => rollout.stage))].sort((a, b) => a - b);
fill(at("q-show"), offered.map(name => [name, name]));
fill(at("q-kind"), [["", "All question types"], ...kindsOf(data.questions, "problem_type")]);
fill(at("q-stage"), [["", "All stages"], ...stagesSeen.map(place => [String(place), data.stages[place]])]);
fill(at("q-sort"), [["", "As drawn"], ["longest", "Longest first"], ["hardest", "Lowest accuracy first"], ["mixed", "Most divided first"]]);
fill(at("p-kind"), [["", "All kinds"], ...kindsOf(data.pairs, "kind")]);

const lists = {
  questions: paged("q", 10, chosenQuestions, questionView, items =>
    `${plural(items.length, "question")}, ${plural(items.reduce((sum, item) => sum + item.rollouts.length, 0), "rollout")} match`),
  pairs: paged("p", 5, chosenPairs, pairView, items => `${plural(items.length, "pair")} match`),
};
at("q-filters").hidden = !data.questions.length;
at("p-filters").hidden = !data.pairs.length;
if (data.questions.length) lists.questions.update();
if (data.pairs.length) lists.pairs.update();

// A table that is cut at the side says so.
function hint() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.previousElementSibling.classList.toggle("shown", box.scrollWidth > box.clientWidth);
  }
}
addEventListener("resize", hint);
hint();
