//! `strftime` of chat templates: the date in a system prompt. Pure; the time is an argument. UTC, English, as servers run.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats `now` as C's `strftime` in the C locale would. The error is the directive that is not known.
pub fn strftime(format: &str, now: SystemTime) -> Result<String, String> {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let date = Date::new(since.as_secs());
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-'); // %-d: glibc's way to drop the padding
        if !padded {
            directive = chars.next();
        }
        let Some(directive) = directive else { return Err("%".into()) };
        date.write(&mut out, directive, padded, since.as_micros())?;
    }
    Ok(out)
}

struct Date {
    year: i64,
    /// 1 to 12.
    month: u64,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Monday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
    unix: u64,
}

impl Date {
    /// Source: Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.
    fn new(unix: u64) -> Self {
        let days = unix / 86_400;
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = (year_of_era + era * 400) as i64 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
        Self {
            year,
            month,
            day,
            day_of_year: before + day + u64::from(leap && month > 2),
            weekday: (days + 3) % 7, // 1970-01-01 was a Thursday
            hour: unix / 3600 % 24,
            minute: unix / 60 % 60,
            second: unix % 60,
            unix,
        }
    }

    fn write(&self, out: &mut String, directive: char, padded: bool, unix_us: u128) -> Result<(), String> {
        let two = |out: &mut String, value: u64| {
            _ = if padded { write!(out, "{value:02}") } else { write!(out, "{value}") };
        };
        let hour12 = match self.hour % 12 {
            0 => 12,
            hour => hour,
        };
        let day_name = DAYS[self.weekday as usize];
        let month_name = MONTHS[self.month as usize - 1];
        match directive {
            'Y' => _ = write!(out, "{}", self.year),
            'y' => two(out, self.year as u64 % 100),
            'm' => two(out, self.month),
            'd' => two(out, self.day),
            'e' if padded => _ = write!(out, "{:2}", self.day),
            'e' => two(out, self.day),
            'H' => two(out, self.hour),
            'I' => two(out, hour12),
            'M' => two(out, self.minute),
            'S' => two(out, self.second),
            'f' => _ = write!(out, "{:06}", unix_us % 1_000_000),
            'j' if padded => _ = write!(out, "{:03}", self.day_of_year),
            'j' => two(out, self.day_of_year),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'A' => out.push_str(day_name),
            'a' => out.push_str(&day_name[..3]),
            'B' => out.push_str(month_name),
            'b' | 'h' => out.push_str(&month_name[..3]),
            'u' => _ = write!(out, "{}", self.weekday + 1),
            'w' => _ = write!(out, "{}", (self.weekday + 1) % 7),
            's' => _ = write!(out, "{}", self.unix),
            'F' => _ = write!(out, "{}-{:02}-{:02}", self.year, self.month, self.day),
            'T' => _ = write!(out, "{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            '%' => out.push('%'),
            other => return Err(format!("%{other}")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(unix: u64, format: &str) -> String {
        strftime(format, SystemTime::UNIX_EPOCH + Duration::from_secs(unix)).expect("known directives")
    }

    /// Expectations are what `date -u -d @N +FORMAT` prints.
    #[test]
    fn formats_as_date_does() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S %j"), "Thursday 01 January 1970 00:00:00 001");
        assert_eq!(
            at(1_709_210_096, "%a, %-d %b %y %I:%M %p %j %F %T"),
            "Thu, 29 Feb 24 12:34 PM 060 2024-02-29 12:34:56"
        );
        assert_eq!(at(1_735_689_599, "%d %b %Y %e %u%w %j"), "31 Dec 2024 31 22 366");
        assert_eq!(at(4_107_542_400, "%Y-%m-%d %%"), "2100-03-01 %");
    }

    #[test]
    fn names_what_it_does_not_know() {
        assert_eq!(strftime("%Q", SystemTime::UNIX_EPOCH), Err("%Q".into()));
        assert_eq!(strftime("%", SystemTime::UNIX_EPOCH), Err("%".into()));
    }
}
