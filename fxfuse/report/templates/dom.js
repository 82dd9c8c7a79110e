"use strict";
// Elements, and numbers as a person reads them (the same digits as fxfuse/report/words.py).

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function digits(number) {
  const whole = Math.abs(number);
  return number.toFixed(whole >= 100 ? 0 : whole >= 10 ? 1 : 2);
}

function scaled(number, units, smallest) {
  for (const [unit, scale] of units) if (Math.abs(number) >= scale) return `${digits(number / scale)} ${unit}`;
  return `${number.toFixed(0)} ${smallest}`;
}

const bytes = (number) => scaled(number, [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]], "B");
const operations = (number) => scaled(number, [["TFLOP", 1e12], ["GFLOP", 1e9], ["MFLOP", 1e6]], "FLOP");
const plural = (number, what) => `${number} ${what}${number === 1 ? "" : what.endsWith("ch") ? "es" : "s"}`;
const colour = (region) => `r${region % 8}`;

function duration(seconds) {
  const [unit, scale] = [["s", 1], ["ms", 1e-3], ["us", 0]].find(([, scale]) => seconds >= 0.1 * scale);
  return `${Number((seconds / (scale || 1e-6)).toPrecision(2))} ${unit}`;
}

// a path or a name that lines may break behind its dots and underscores
const breakable = (text) => text.split(/(?<=[._])/).flatMap((piece, i) => (i ? [el("wbr"), piece] : [piece]));

const sum = (values) => values.reduce((a, b) => a + b, 0);
