//! The handshake of a stdio stream.
//!
//! The shim makes a random token for each stream and hands it to the agent in the API call; the agent dials
//! the host and sends the token as the first bytes. Containers share the guest's vsock with the agent, so a
//! connection that does not open with a token the shim is waiting for is closed unread. After the token
//! the bytes are raw; a half-close is EOF.

use std::fmt;

/// Length of a token on the wire, in bytes.
pub const TOKEN_LEN: usize = 32;

/// An unguessable name for one stream.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Token([u8; TOKEN_LEN]);

impl Token {
    /// Wraps random bytes.
    pub fn new(bytes: [u8; TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// Reads a token out of an API message: `None` where the field is empty (the stream is `/dev/null`).
    ///
    /// # Errors
    /// [`BadToken`] for any other length.
    pub fn from_field(field: &[u8]) -> Result<Option<Self>, BadToken> {
        match field.len() {
            0 => Ok(None),
            _ => field
                .try_into()
                .map(|bytes| Some(Self(bytes)))
                .map_err(|_| BadToken(field.len())),
        }
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8; TOKEN_LEN] {
        &self.0
    }
}

/// Tokens are secrets towards the containers: a log shows only enough to tell two apart.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

/// A token field of the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("a stream token is {TOKEN_LEN} bytes or absent, this one has {0}")]
pub struct BadToken(pub usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_absent_whole_or_refused() {
        assert_eq!(Token::from_field(&[]).unwrap(), None);
        assert_eq!(
            Token::from_field(&[7; TOKEN_LEN]).unwrap(),
            Some(Token::new([7; TOKEN_LEN]))
        );
        assert!(Token::from_field(&[7; TOKEN_LEN - 1]).is_err());
        assert!(Token::from_field(&[7; TOKEN_LEN + 1]).is_err());
    }

    #[test]
    fn debug_does_not_print_the_secret() {
        assert_eq!(
            format!("{:?}", Token::new([0xab; TOKEN_LEN])),
            "Token(abab…)"
        );
    }
}
