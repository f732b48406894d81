// Numbers as people read them.

export function bytes(count) {
  const unit = count >= 2 ** 30 ? ["GiB", 2 ** 30] : count >= 2 ** 20 ? ["MiB", 2 ** 20] : ["KiB", 2 ** 10];
  const value = count / unit[1];
  return `${value.toFixed(value && value < 10 ? 1 : 0)} ${unit[0]}`;
}

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

export const percent = (share) => `${+(share * 100).toPrecision(3)} %`;
